"""A worker process: it loads the model and judges of a setup once, and runs cells with them."""

import os
import signal
import threading
from multiprocessing import parent_process
from typing import cast

from ...errors import ForgetError
from .cells import Cell, Setup
from .lab import Lab, Outcome, open_lab

_labs: dict[str, Lab] = {}  # of this process; only the last one, as a model may be large


def start_process(threads: int) -> None:
    """Called once in each worker process of this machine; it lives no longer than its parent."""
    # Ctrl-C in a terminal reaches all processes; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    set_threads(threads)


def _exit_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def set_threads(threads: int) -> None:
    """Threads of several processes must not fight for the cores."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(threads)


def work(setup: Setup, cell: Cell, patches: list[bytes]) -> Outcome:
    """Run one cell in this process."""
    key = repr(setup)
    if key not in _labs:
        _labs.clear()
        _labs[key] = make_lab(setup)
    return _labs[key].run(cell, patches)


def make_lab(setup: Setup) -> Lab:
    """Load the model and the judges that a setup names.

    Raises:
        ForgetError: one of them is missing, or the model is not the one the setup was made for.
    """
    from ...hosts.diffusers.open import open_model
    from ...models.interface import UNetModel

    model = open_model(setup.model, vae=setup.vae or None, prediction=setup.prediction or None)
    if model.fingerprint() != setup.fingerprint:
        raise ForgetError(
            f"The model at '{setup.model}' on this machine has other weights than the one the run "
            "began with: put the same file there."
        )
    # Measures ask others than U-Nets for no more than they have; see ``names.ANY_MODEL``.
    return open_lab(setup, cast(UNetModel, model))
