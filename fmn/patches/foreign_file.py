"""Files of other erasers and trainers, read without running anything in them.

What a file is follows from its first bytes, not from its name. Pickles go through torch's
``weights_only`` loader, which builds tensors and plain containers and refuses everything else.
"""

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ..downloads import ZIP, first_bytes
from ..errors import ForgetError
from ..files import open_safetensors

MAX_HEADER = 64 << 20  # bytes; a whole SDXL checkpoint's header is about 0.5 MiB
MAX_TENSORS = 100_000
MAX_DEPTH = 6  # of dictionaries inside dictionaries
PICKLES = ZIP, *(bytes([0x80, protocol]) for protocol in range(2, 6))
# Dictionaries that trainers put around their weights; the name says nothing about the layers.
WRAPPERS = ("state_dict", "model", "module", "params", "weights", "lora", "network")


@dataclass(frozen=True)
class ForeignFile:
    """The tensors of a file and what it says of itself.

    Attributes:
        tensors: key -> tensor, read when asked for.
        metadata: of a safetensors header; empty for pickles.
        sha256: of the file's bytes, 64 hex digits.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    metadata: dict[str, str]
    sha256: str


def read_foreign(path: str | Path) -> ForeignFile:
    """Open a safetensors file or a pickle of tensors.

    Raises:
        ForgetError: it is neither, damaged, a Git LFS pointer, a web page, or a pickle that holds
            more than tensors.
    """
    path = Path(path)
    start = first_bytes(path)
    tensors: Mapping[str, torch.Tensor]
    metadata: dict[str, str] = {}
    # A safetensors header may be as long as a pickle's first bytes say, but then begins with {.
    if start.startswith(PICKLES) and start[8:9] != b"{":
        tensors = _read_pickle(path)
    else:
        tensors, metadata = _read_safetensors(path)
    if not tensors:
        raise ForgetError(f"'{path.name}' holds no tensors: it cannot change a model.")
    return ForeignFile(path.name, tensors, metadata, sha256_of(path))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Lazy(Mapping):
    """Tensors of a safetensors file, read one at a time."""

    def __init__(self, path: Path, keys: list[str]):
        self._path, self._keys = path, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise KeyError(key)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _read_safetensors(path: Path) -> tuple[_Lazy, dict[str, str]]:
    remedy = "give the eraser's weights, whole, as a .safetensors, .pt, .bin or .ckpt file"
    with open_safetensors(path, remedy, MAX_HEADER) as file:
        return _Lazy(path, list(file.keys())), dict(file.metadata() or {})


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForgetError(
            f"'{path.name}' is a pickle that holds more than tensors, which could run code: "
            "convert it to safetensors with the program that made it."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ForgetError(
            f"'{path.name}' is cut short or damaged ({type(error).__name__}): download it again."
        ) from error
    return dict(_flat(path.name, content))


def _flat(name: str, content: object, prefix: str = "", depth: int = 0) -> Iterator:
    """(key, tensor) of nested dictionaries, keys joined by dots and wrappers left out."""
    if isinstance(content, torch.Tensor) and prefix:
        yield prefix, content.detach()
    elif isinstance(content, dict) and depth < MAX_DEPTH and len(content) <= MAX_TENSORS:
        for key, value in content.items():
            wrapper = depth == 0 and key in WRAPPERS and isinstance(value, dict)
            inner = "" if wrapper else str(key)
            yield from _flat(name, value, ".".join(filter(None, (prefix, inner))), depth + 1)
    elif depth == 0:
        raise ForgetError(
            f"'{name}' holds a {type(content).__name__}, not layers by name: give the weights "
            "that the eraser saved, not its vectors or its settings."
        )
