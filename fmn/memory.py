"""Peak memory of a piece of work, beyond what was in use before it."""

from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")


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
    return _kilobytes(STATUS, name) if STATUS.is_file() else None


def _kilobytes(file, name):
    for line in file.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def free_memory(device):
    """Bytes that a device can still give, or None where nobody tells."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "cpu" and MEMINFO.is_file():
        return _kilobytes(MEMINFO, "MemAvailable")
    return None
