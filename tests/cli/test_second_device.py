"""All methods where the model is not on the CPU; by a mock of a GPU, see ``second_device``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import second_device

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if second_device.compiler() is None:
        pytest.skip("There is no C++ compiler here, which the mock of a GPU is made with.")
    target = tmp_path_factory.mktemp("device") / "device.so"
    second_device.build(target)
    return str(target)


def on_it(library, *arguments):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "second_device.plugin",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [*command, *arguments], cwd=TESTS, capture_output=True, text=True,
        env=os.environ | {"SECOND_DEVICE": library},
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


MISTAKES = """
import torch, second_device
card = second_device.load({library!r})
there, here = torch.ones(2, 3, device=card), torch.ones(2, 3)
assert (there + 1).sum().item() == 12 and there.to("cpu").equal(here)
for mistake in (
    lambda: there + here,
    lambda: there @ here.T,
    lambda: torch.cat([there, here]),
    lambda: torch.nn.functional.conv2d(there[None, None], here[None, None]),
    lambda: torch.randn(3, device=card, generator=torch.Generator()),
    lambda: there.numpy(),
):
    try:
        mistake()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("a mistake was let through")
"""


def test_the_mock_finds_mistakes(library):
    code = MISTAKES.format(library=library)
    run = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# In parts, so that each has two minutes.
def test_every_method_through_diffusers(library):
    code, said = on_it(library, "second_device/presets.py")
    assert code == 0, said


def test_every_method_in_comfyui(library):
    code, said = on_it(library, "comfyui/test_every_method.py", "-k", "success")
    assert code == 0, said


def test_with_little_memory_in_comfyui(library):
    code, said = on_it(library, "comfyui/on_a_card.py")
    assert code == 0, said
