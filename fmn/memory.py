"""Memory: the peak of a piece of work, what is free, and what becomes of what is freed."""

import ctypes
import platform
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


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
    return bytes_in(STATUS, name) if STATUS.is_file() else None


def bytes_in(file, name):
    """What a file like /proc/self/status says of a name, in bytes; None if nothing."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def free_memory(device):
    """Bytes that a device can still give, or None where nobody tells."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "cpu" and MEMINFO.is_file():
        return bytes_in(MEMINFO, "MemAvailable")
    return None


def has_heap():
    """Whether ``heap`` can do anything: the C library is glibc."""
    return platform.libc_ver()[0] == "glibc"


@contextmanager
def heap(gives_back):
    """What the C library does for a while with memory that tensors on a CPU leave (glibc only).

    By its own rules it keeps blocks of some megabytes in a heap that gets holes, and so holds two
    to four times what is alive; it still returns enough of it for page faults to cost time
    (``benchmarks/memory.py``). Afterwards its thresholds are those that it arrives at by itself.

    Args:
        gives_back: whether freed memory goes back at once, so that the process holds what is
            alive; else all of it is kept, which is faster.
    """
    set_option = ctypes.CDLL(None).mallopt
    try:
        if gives_back:
            set_option(M_MMAP_THRESHOLD, 128 << 10)
            set_option(M_TRIM_THRESHOLD, 128 << 10)
        else:
            set_option(M_MMAP_MAX, 0)
            set_option(M_TRIM_THRESHOLD, -1)
        yield
    finally:
        set_option(M_MMAP_MAX, 1 << 16)
        set_option(M_MMAP_THRESHOLD, 32 << 20)
        set_option(M_TRIM_THRESHOLD, 64 << 20)
        ctypes.CDLL(None).malloc_trim(0)
