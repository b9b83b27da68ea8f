"""How much memory training will need, before it starts, and how to make do with less."""

import logging
import weakref
from math import prod
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .errors import ForgetError
from .families import layers
from .memory import free_memory

log = logging.getLogger(__name__)
GB = 1e9
COPIES = 3  # of what is trained, beside it and its gradient: AdamW's two moments, the last good one
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


def estimate(borrowed, family, parameters, loss_of):
    """What a training step takes, without computing one.

    The step is gone through on tensors that have a shape and no numbers (``FakeTensorMode``), and
    what is alive at once is counted. What kernels take inside is not.

    Args:
        parameters: that are trained.
        loss_of: function to a step's loss that goes by no tensor's values; its inputs exist.

    Returns:
        an ``Estimate``; None if a part of the model does go by values.
    """
    known = layers(family)
    size = borrowed.module(known[0].name).weight.element_size()
    weights = size * sum(prod(layer.shape) for layer in known)
    trained = sum(each.nbytes for each in parameters)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), _Alive() as alive:
            torch.autograd.grad(loss_of(), parameters, allow_unused=True)
    except CANNOT:
        return None
    return Estimate(weights, alive.most, trained * (1 + COPIES))


def planned(train, checkpointing, estimate_of, device):
    """What ``train(checkpointing, note)`` returns, if need be with checkpointing.

    It is turned on where the estimate says that memory will not do, and where memory ran out: then
    training starts anew, once. Either is logged, and is in the note with the estimate.

    Args:
        checkpointing: whether the settings ask for it.
        estimate_of: function from checkpointing to an ``Estimate`` or None.

    Raises:
        ForgetError: memory ran out, and there is no cheaper way.
    """
    needed, free = estimate_of(checkpointing), free_memory(device)
    note = "" if needed is None else str(needed)
    if not (checkpointing or needed is None or free is None) and needed.beyond > free:
        checkpointing = True
        needed = estimate_of(True)
        note = f"{needed}; checkpointing was turned on, as {free / GB:.1f} GB are free"
    if note:
        log.info(note)
    found = _tried(train, checkpointing, note)
    if found is None and not checkpointing:
        note = f"{note}; memory ran out, so training began anew with checkpointing".strip("; ")
        log.warning(note)
        found = _tried(train, True, note)
    if found is None:
        raise ForgetError(
            "Memory ran out while training, with checkpointing too: choose a smaller size, a "
            "smaller batch, or fewer layers."
        )
    return found


def _tried(train, checkpointing, note):
    # A function of its own: its frame, and what the error's frames hold, is gone afterwards.
    try:
        return train(checkpointing, note)
    except torch.OutOfMemoryError:
        return None


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        views = any(each.alias_info is not None for each in function._schema.returns)
        for each in () if views else torch.utils._pytree.tree_leaves(made):
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
