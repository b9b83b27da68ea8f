"""Weight files of any program, read without running anything in them.

What a file is follows from its first bytes, not from its name. Pickles go through torch's
``weights_only`` loader, which builds tensors and plain containers and refuses everything else.
"""

import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
PARTS = "unet", "text_encoder", "text_encoder_2"  # of a diffusers folder, that erasers edit
# A copy's name, such as fp16, and one of several shards may stand in a file's name.
PART_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?"
    r"\.(safetensors|bin)"
)


@dataclass(frozen=True)
class ForeignFile:
    """The tensors of a file and what it says of itself.

    Attributes:
        tensors: key -> tensor, read when asked for.
        metadata: of a safetensors header; empty for pickles.
        path: of the file, or of the first of several.
    """

    name: str
    tensors: "Tensors"
    metadata: dict[str, str]
    path: Path

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes, 64 hex digits."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        return self.tensors.shape(key)


def read_foreign(path: str | Path) -> ForeignFile:
    """Open a safetensors file or a pickle of tensors.

    Raises:
        ForgetError: it is neither, damaged, a Git LFS pointer, a web page, or a pickle that holds
            more than tensors.
    """
    path = Path(path)
    start = first_bytes(path)
    metadata: dict[str, str] = {}
    # A safetensors header may be as long as a pickle's first bytes say, but then begins with {.
    if start.startswith(PICKLES) and start[8:9] != b"{":
        tensors = _read_pickle(path)
    else:
        tensors, metadata = _read_safetensors(path)
    if not tensors:
        raise ForgetError(f"'{path.name}' holds no tensors: it cannot change a model.")
    return ForeignFile(path.name, tensors, metadata, path)


def read_folder(path: Path, parts: Sequence[str] = PARTS) -> ForeignFile:
    """Parts of a diffusers folder as one file, keys with the part's name in front.

    Raises:
        ForgetError: there are no weights in it, or see ``read_foreign``.
    """
    return read_parts(str(path), {f"{part}.": path / part for part in parts})


def read_parts(name: str, folders: Mapping[str, Path]) -> ForeignFile:
    """Folders of weights as one file of that name, keys with a prefix of each folder in front.

    Of several copies the plain one is read, or the first by name, such as fp16; of several formats
    safetensors.

    Args:
        folders: prefix -> folder, which may be absent.
    """
    tensors, first = Tensors({}), None
    for prefix, folder in folders.items():
        found = ((file, PART_FILE.fullmatch(file.name)) for file in sorted(folder.glob("*")))
        kinds = {file: (m[1] or "", m[2] != "safetensors") for file, m in found if m}
        for file in (file for file, kind in kinds.items() if kind == min(kinds.values())):
            tensors.add(read_foreign(file).tensors, prefix)
            first = first or file
    if first is None:
        raise ForgetError(
            f"'{name}' holds no weights of a diffusers model: give a folder with "
            "unet/diffusion_pytorch_model.safetensors in it, or a single file."
        )
    return ForeignFile(name, tensors, {}, first)


class Tensors(Mapping):
    """Tensors by key, of dictionaries, or of open safetensors files and read when asked for."""

    def __init__(self, source: Any) -> None:
        """``source``: a dictionary or an open file."""
        self._places = {key: (source, key) for key in source.keys()}  # noqa: SIM118 - a handle

    def add(self, other: "Tensors", prefix: str) -> None:
        """Another's tensors, with a prefix before their keys."""
        self._places |= {prefix + key: place for key, place in other._places.items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        source, key = self._places[key]
        return source[key] if isinstance(source, dict) else source.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
        source, key = self._places[key]
        return tuple(
            source[key].shape if isinstance(source, dict) else source.get_slice(key).get_shape()
        )


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    remedy = "give the eraser's weights, whole, as a .safetensors, .pt, .bin or .ckpt file"
    with open_safetensors(path, remedy, MAX_HEADER) as file:
        metadata = dict(file.metadata() or {})
    return Tensors(safe_open(path, framework="pt")), metadata


def _read_pickle(path: Path) -> Tensors:
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
    return Tensors(dict(_flat(path.name, content)))


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
