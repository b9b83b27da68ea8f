"""Peak memory of a piece of work, beyond what was in use before it."""

from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_memory():
    """Yields a function that tells the peak in bytes since the start; call it before the end.

    On a GPU, of what torch allocated there. Else of the process's resident memory, which Linux
    tells; elsewhere it gives None.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    before = _resident("VmRSS")
    if before is None:
        yield lambda: None
        return
    try:
        CLEAR.write_text("5")  # forget the peak so far
    except OSError:  # not ours to reset, in some containers: the peak may be an older one
        yield lambda: None
        return
    yield lambda: max(0, _resident("VmHWM") - before)


def _resident(name):
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
