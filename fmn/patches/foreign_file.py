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
from safetensors import SafetensorError, safe_open

from ..errors import ForgetError

MAX_HEADER = 64 << 20  # bytes; a whole SDXL checkpoint's header is about 0.5 MiB
MAX_TENSORS = 100_000
MAX_DEPTH = 6  # of dictionaries inside dictionaries
LFS, ZIP = b"version https://git-lfs", b"PK\x03\x04"
# Dictionaries that trainers put around their weights; the name says nothing about the layers.
WRAPPERS = ("state_dict", "model", "module", "params", "weights", "lora", "network")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


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
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ForgetError(
            f"'{path}' cannot be read ({error.strerror}): check the name and its folder."
        ) from error
    refuse_no_weights(path, start)
    tensors: Mapping[str, torch.Tensor]
    metadata: dict[str, str] = {}
    if start.startswith(ZIP) or start[:2] in (b"\x80\x02", b"\x80\x04"):
        tensors = _read_pickle(path)
    else:
        tensors, metadata = _read_safetensors(path, size, start)
    if not tensors:
        raise ForgetError(f"'{path.name}' holds no tensors: it cannot change a model.")
    return ForeignFile(path.name, tensors, metadata, sha256_of(path))


def refuse_no_weights(path: Path, start: bytes) -> None:
    """Refuse by its first bytes what is often saved in place of a weight file."""
    if start.startswith(LFS):
        raise ForgetError(
            f"'{path.name}' is a Git LFS pointer, not the file itself: run 'git lfs pull' in its "
            "repository, or download it again."
        )
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ForgetError(
            f"'{path.name}' is a web page saved under that name: download the file itself."
        )
    if not start:
        raise ForgetError(f"'{path.name}' is empty: download it again.")


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


def _read_safetensors(path: Path, size: int, start: bytes) -> tuple[_Lazy, dict[str, str]]:
    header = int.from_bytes(start[:8], "little")
    if size < 10 or start[8:9] != b"{" or header > MAX_HEADER:
        raise ForgetError(
            f"'{path.name}' is neither a safetensors file nor a torch file: give the eraser's "
            "weights, such as a .safetensors, .pt, .bin or .ckpt file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            return _Lazy(path, list(file.keys())), dict(file.metadata() or {})
    except SafetensorError as error:
        raise ForgetError(
            f"'{path.name}' is cut short or damaged ({str(error)[:80]}): download it again."
        ) from error


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
