"""A worker process: it makes the lab that a setup describes once, and does cells in it."""

import os
from pathlib import Path

from ...files import DEMO_FOLDER
from ..suite import parse_suite

_labs = {}


def start_worker(threads):
    """Called once in each process. Threads of several processes must not fight for the cores."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(threads)


def work(setup, cell, patches):
    """Do one cell in this process; returns (result, patch bytes or None, seconds)."""
    return lab_for(setup).run(cell, patches)


def lab_for(setup):
    """The lab of this setup; only the last one is kept, as a model may be large."""
    key = repr(setup)
    if key not in _labs:
        _labs.clear()
        _labs[key] = make_lab(setup)
    return _labs[key]


def make_lab(setup, on_work=lambda count: None):
    """Load the model and the judges that a setup names.

    Raises:
        ForgetError: one of them is missing, or the model is not the one the setup was made for.
    """
    from ...errors import ForgetError
    from ...hosts.diffusers.model import DiffusersModel
    from .lab import Lab, judge_for

    model = DiffusersModel.load(setup.model)
    if model.fingerprint() != setup.fingerprint:
        raise ForgetError(
            f"The model at '{setup.model}' on this machine has other weights than the one the run "
            "began with: put the same file there."
        )
    suite = parse_suite(setup.suite, "suite")
    judges = {
        name: judge_for(spec, suite) if (spec := getattr(setup, name)) else None
        for name in ("judge", "check", "clip")
    }
    return Lab(setup, model, **judges, controls=read_controls(setup.controls), on_work=on_work)


def demo_controls():
    """The folder of strips that comes with the demo model, or ""."""
    folder = DEMO_FOLDER / "controls"
    return str(folder) if folder.is_dir() else ""


def read_controls(folder):
    """Pictures of things the model never knew: name -> [N, H, H, 3] in 0..1.

    Args:
        folder: of PNG strips, square pictures side by side, named after what they show; or "".

    Raises:
        ForgetError: a file there is no such strip.
    """
    import numpy as np
    import torch
    from PIL import Image

    from ...errors import ForgetError

    found = {}
    for file in sorted(Path(folder).glob("*.png")) if folder else ():
        try:
            strip = np.array(Image.open(file).convert("RGB"))
        except OSError as error:
            raise ForgetError(f"'{file}' is no picture ({error}): remove or replace it.") from error
        height, width, _ = strip.shape
        if width % height:
            raise ForgetError(
                f"'{file}' is {width} x {height}: a strip of square pictures has a width that is a "
                "multiple of its height."
            )
        squares = torch.from_numpy(strip).unflatten(1, (-1, height)).transpose(0, 1)
        found[file.stem] = squares.float() / 255
    return found
