"""How much memory training will need, before it starts, and how to make do with less."""

import ctypes
import logging
import platform
import weakref
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ForgetError, memory_ran_out
from ..models.families import layers

pass

log = logging.getLogger(__name__)
GB = 1e9
HELD = 4  # a CPU's heap holds so many times of what is alive, at most, unless it gives back
COPIES = 3  # of what is trained, beside it and its gradient: AdamW's two moments, the last good one
CONVOLUTIONS = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
CANNOT = DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException


class Estimate(NamedTuple):
    """Bytes of memory that training takes."""

    weights: int  # of the U-Net; they are in memory before
    activations: int  # the most that a step holds beside them, gradients included
    optimiser: int  # what is trained, and what is kept of it

    @property
    def beyond(self):
        return self.activations + self.optimiser

    def __str__(self):
        parts = zip(self._fields, self)
        return "memory: " + ", ".join(f"{name} {size / GB:.2f} GB" for name, size in parts)


def estimate(denoiser, family, parameters, loss_of):
    """What a training step takes, without computing one.

    The step is gone through on tensors that have a shape and no numbers (``FakeTensorMode``), and
    what is alive at once is counted, with what convolutions on a CPU take inside.

    Args:
        parameters: that are trained.
        loss_of: function to a step's loss that goes by no tensor's values; its inputs exist.

    Returns:
        an ``Estimate``; None if a part of the model does go by values.
    """
    known = layers(family)
    size = denoiser.module(known[0].name).weight.element_size()
    weights = size * sum(prod(layer.shape) for layer in known)
    trained = sum(each.nbytes for each in parameters)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _Alive() as alive:
            torch.autograd.grad(loss_of(), parameters, allow_unused=True)
    except CANNOT:
        return None
    return Estimate(weights, alive.most, trained * (1 + COPIES))


class Plan(NamedTuple):
    """How a step is computed; each way gives the same gradients, but for rounding.

    Attributes:
        checkpointing: what is inside of blocks is computed again for gradients, not stored.
        apart: the prompts of a step go one after the other, not as a batch.
    """

    checkpointing: bool
    apart: bool = False

    def beside(self, other):
        """What this plan does and the other does not, in words."""
        told = {"checkpointing is on": self.checkpointing > other.checkpointing,
                "prompts go one at a time": self.apart > other.apart}  # fmt: skip
        return " and ".join(words for words, new in told.items() if new)


def plans(checkpointing, batch):
    """Plans from the fastest to the one that takes the least memory.

    Args:
        checkpointing: whether the settings ask for it. batch: prompts a step.
    """
    apart = batch > 1
    ways = Plan(checkpointing), Plan(checkpointing, apart), Plan(True, apart)
    return list(dict.fromkeys(ways))


def planned(train, ways, estimate_of, device):
    """What ``train(plan, note)`` returns with the first plan that fits the free memory.

    If memory runs out all the same, training starts anew, once, with the last. Either is logged,
    and is in the note with the estimate.

    Args:
        ways: of ``plans``.
        estimate_of: function from a plan to an ``Estimate`` or None.

    Raises:
        ForgetError: memory ran out, and there is no cheaper way.
    """
    free = free_memory(device)
    plan, needed = _first_that_fits(ways, estimate_of, free)
    least = ways[-1]
    note = "" if needed is None else str(needed)
    if plan != ways[0]:
        note = f"{note}; {plan.beside(ways[0])}, as {free / GB:.1f} GB are free"
    if note:
        log.info(note)
    with _heap_for(needed, free, device):
        found = _tried(train, plan, note)
    if found is None and plan != least:
        what = f"memory ran out, so training began anew: {least.beside(plan)}"
        note = f"{note}; {what}".strip("; ")
        log.warning(note)
        found = _tried(train, least, note)
    if found is None:
        raise ForgetError(
            "Memory ran out while training, in the way that takes the least: choose a smaller "
            "size, or fewer layers."
        )
    return found


def _first_that_fits(ways, estimate_of, free):
    for plan in ways:
        needed = estimate_of(plan)
        if needed is None or free is None or needed.beyond <= free:
            break
    return plan, needed


def _heap_for(needed, free, device):
    if device.type != "cpu" or needed is None or free is None or not has_heap():
        return nullcontext()
    return heap(gives_back=needed.beyond * HELD > free)


def _tried(train, plan, note):
    # A function of its own: its frame, and what the error's frames hold, is gone afterwards.
    try:
        return train(plan, note)
    except (RuntimeError, MemoryError) as error:  # of which torch's own for GPUs is one
        if memory_ran_out(error) is None:
            raise
        return None


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.most = max(self.most, self.now + _workspace(function, args, made))
        views = any(each.alias_info is not None for each in function._schema.returns)
        for each in () if views else tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return made

    def _add(self, storage):
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _free(self, size):
        self.now -= size


def _workspace(function, args, made):
    """Bytes that a convolution on a CPU takes inside: oneDNN lays its tensors out in blocks, and
    makes a copy of each for that."""
    if function.overloadpacket not in CONVOLUTIONS:
        return 0
    tensors = [each for each in (*args, *tree_leaves(made)) if isinstance(each, torch.Tensor)]
    return sum(each.nbytes for each in tensors) if tensors[0].device.type == "cpu" else 0


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
