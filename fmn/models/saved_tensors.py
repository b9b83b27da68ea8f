"""Backward through networks that write into tensors which it needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class _Saved:
    """A tensor that backward needs as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


_ByStorage = dict[int, WeakSet[_Saved]]


@contextmanager
def copied_before_writing() -> Iterator[None]:
    """Tensors that are saved for backward may be written to: what they held is copied before.

    torch.autograd.graph.allow_mutation_on_saved_tensors knows a tensor by its id, address and
    version (torch 2.13). Those of one that is freed can come again, and backward then takes the
    other's values without a word. Here a saved tensor keeps its storage, and so the storage's
    number, until it is copied.
    """
    by_storage: _ByStorage = {}

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        by_storage.setdefault(_storage(tensor), WeakSet()).add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor), _CopyBeforeWriting(by_storage):
        yield


class _CopyBeforeWriting(TorchDispatchMode):
    def __init__(self, by_storage: _ByStorage) -> None:
        super().__init__()
        self.by_storage = by_storage

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for written in value if isinstance(value, (list, tuple)) else (value,):
                    if written is not None:
                        self._copy(written)
        return func(*args, **kwargs)

    def _copy(self, written: Tensor) -> None:
        """Copy what was saved of its storage, once where it is the same part."""
        copies: dict[tuple, Tensor] = {}
        for saved in self.by_storage.pop(_storage(written), ()):
            part = saved.tensor
            key = part.data_ptr(), part.dtype, part.shape, part.stride()
            if key not in copies:
                copies[key] = part.detach().clone()
            saved.tensor = copies[key]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
