"""A second device, for faults that show only where a model is not on the CPU.

A mock of a GPU: see ``device.cpp`` for what it keeps to. It counts for one process, whose device
it becomes; so tests on it run in a process of their own (``cli/test_second_device.py``).
"""

import shutil
import subprocess
import types
from pathlib import Path

import torch

NAME = "card"
SOURCE = Path(__file__).parent / "device.cpp"


def compiler():
    """The C++ compiler's path, or None."""
    return shutil.which("c++") or shutil.which("g++")


def build(target):
    """Compile the device's library."""
    home = Path(torch.__file__).parent
    inside = home / "include"
    folders = [f"-I{inside}", f"-I{inside / 'torch' / 'csrc' / 'api' / 'include'}"]
    linked = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    how = ["-shared", "-fPIC", "-std=c++20", "-O0", "-w"]
    subprocess.run(
        [compiler(), *how, *folders, str(SOURCE), "-o", str(target), *linked], check=True
    )


def load(library):
    """Make the device known to this process's torch.

    Returns:
        its ``torch.device``
    """
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)
