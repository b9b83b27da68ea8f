"""Weight files of any program, read without running anything in them.

What a file is follows from its first bytes, not from its name. Pickles go through torch's
``weights_only`` loader, after a look at what they name: only tensors and plain containers. Tensors
stay in the file until they are asked for, so memory does not depend on what a file claims.
"""

import hashlib
import mmap
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
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
TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch before 1.6 began its files with
PICKLES = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]")
# What a pickle of tensors names, beside storages of torch.
NAMED = {
    "collections OrderedDict", "torch Size", "torch device", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
}  # fmt: skip
NAMED_TYPES = re.compile(r"torch(\.storage)? (\w+Storage|u?int\d+|bool|b?float\d+\w*)")
# Dictionaries that trainers put around their weights; the name says nothing about the layers.
WRAPPERS = ("state_dict", "model", "module", "params", "weights", "lora", "network")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
PARTS = "unet", "text_encoder", "text_encoder_2"  # of a diffusers folder, that erasers edit
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
LIBRARY_NAMES = "diffusion_pytorch_model", "model", "lora_weights", "adapter_model"


@dataclass(frozen=True)
class ForeignFile:
    """The tensors of one or several files and what they say of themselves.

    Attributes:
        tensors: key -> tensor, read when asked for.
        metadata: of a safetensors header; empty for pickles.
        paths: of the files.
    """

    name: str
    tensors: "Tensors"
    metadata: dict[str, str]
    paths: tuple[Path, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all bytes of the files, 64 hex digits."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
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
    if PICKLES.match(start) and start[8:9] != b"{":
        tensors = _read_pickle(path, start)
    else:
        tensors, metadata = _read_safetensors(path)
    if not tensors:
        raise ForgetError(f"'{path.name}' holds no tensors: it cannot change a model.")
    return ForeignFile(path.name, tensors, metadata, (path,))


def read_folder(path: Path, parts: Sequence[str] = PARTS) -> ForeignFile:
    """A folder as one file: parts of a diffusers folder with their names in front of keys, one such
    part, or a folder that holds a single eraser.

    Raises:
        ForgetError: see ``read_parts``.
    """
    folders = {f"{part}.": path / part for part in parts}
    if not any(folder.is_dir() for folder in folders.values()):
        folders = {f"{path.name}." if path.name in parts else "": path}
    return read_parts(path.absolute().name, folders)


def read_parts(name: str, folders: Mapping[str, Path]) -> ForeignFile:
    """Folders of weights as one file of that name, keys with a prefix of each folder in front.

    Args:
        folders: prefix -> folder, which may be absent.

    Raises:
        ForgetError: there are no weights in them, several files to choose from, or shards missing;
            or see ``read_foreign``.
    """
    tensors, opened = Tensors({}), []
    for prefix, folder in folders.items():
        for path in _weight_files(folder):
            opened.append(read_foreign(path))
            tensors.add(opened[-1].tensors, prefix)
    if not opened:
        raise ForgetError(
            f"'{name}' holds no weights of a diffusers model: give a folder with "
            "unet/diffusion_pytorch_model.safetensors in it, or a single file."
        )
    paths = tuple(path for file in opened for path in file.paths)
    return ForeignFile(name, tensors, opened[0].metadata, paths)


def _weight_files(folder: Path) -> list[Path]:
    """All shards of a folder's one set of weights: plain before variants such as ``fp16``,
    safetensors before pickles."""
    sets: dict[tuple[str, bool, str], list[Path]] = {}
    for path in sorted(folder.glob("[!.]*")):  # macOS keeps ._NAME beside NAME
        if path.suffix.lower() in WEIGHT_FILES and path.is_file():
            stem, _, variant = SHARD.sub("", path.stem).partition(".")
            pickled = path.suffix.lower() != ".safetensors"
            stem = stem.removeprefix("pytorch_")  # transformers' older name
            sets.setdefault((variant, pickled, stem), []).append(path)
    known = {each: files for each, files in sets.items() if each[2] in LIBRARY_NAMES} or sets
    if not known:
        return []
    if len({stem for *_, stem in known}) > 1:
        names = ", ".join(sorted({files[0].name for files in known.values()}))
        raise ForgetError(
            f"'{folder.name}' holds several files of weights ({names:.120}): give one of them."
        )
    chosen = known[min(known)]
    total = SHARD.search(chosen[0].name)
    if total and int(total[1]) != len(chosen):
        raise ForgetError(
            f"'{folder}' holds {len(chosen)} of {int(total[1])} parts of its weights: download "
            "the others."
        )
    return chosen


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
    remedy = "give the whole file, a .safetensors, .pt, .bin or .ckpt"
    with open_safetensors(path, remedy, MAX_HEADER) as file:
        metadata = dict(file.metadata() or {})
    return Tensors(safe_open(path, framework="pt")), metadata


def _read_pickle(path: Path, start: bytes) -> Tensors:
    if not start.startswith((ZIP, TORCH)):
        raise ForgetError(
            f"'{path.name}' is a raw Python pickle, which could run code, and no file of torch: "
            "vectors that steer a model, as CASteer's, change no weights; save weights as "
            "safetensors."
        )
    try:
        _check_names(path, start)
        # Mapped, a storage that claims more than the file has is an error; read, it is a crash.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=start.startswith(ZIP) or None
        )
    except pickle.UnpicklingError as error:
        raise ForgetError(
            f"'{path.name}' is a pickle that holds more than tensors, which could run code: "
            "convert it to safetensors with the program that made it."
        ) from error
    except MemoryError:
        raise
    # Whatever else a damaged pickle makes torch do wrong; it calls nothing but torch.
    except Exception as error:
        raise _damaged(path.name, type(error).__name__) from error
    return Tensors(dict(_flat(path.name, content)))


def _damaged(name: str, reason: str) -> ForgetError:
    return ForgetError(f"'{name}' is cut short or damaged ({reason:.80}): download it again.")


def _check_names(path: Path, start: bytes) -> None:
    """Raise UnpicklingError if a pickle names anything but tensors and what holds them."""
    with open(path, "rb") as file:
        if start.startswith(ZIP):
            with zipfile.ZipFile(file) as archive:
                size = path.stat().st_size
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                        raise ValueError("compressed")  # torch never does
                pickles = [each for each in archive.namelist() if each.endswith("/data.pkl")]
                streams: list = [BytesIO(archive.read(each)) for each in pickles]
        else:  # a magic number, a version, the system, the content and the keys of its storages
            streams = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)] * 5
        for stream in streams:
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST") and not (
                    argument in NAMED or NAMED_TYPES.fullmatch(str(argument))
                ):
                    raise pickle.UnpicklingError(argument)


def _flat(name: str, content: object) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of nested dictionaries, keys joined by dots and wrappers left out."""
    if not isinstance(content, dict):
        raise ForgetError(
            f"'{name}' holds a {type(content).__name__}, not layers by name: give the weights "
            "that the eraser saved, not its vectors or its settings."
        )
    todo: list[tuple[str, object, int]] = [("", content, 0)]
    for _ in range(MAX_TENSORS):
        if not todo:
            return
        prefix, value, depth = todo.pop()
        if isinstance(value, torch.Tensor) and prefix:
            yield prefix, _whole(name, prefix, value)
        elif isinstance(value, dict) and depth < MAX_DEPTH and len(value) <= MAX_TENSORS:
            for key, inner in reversed(value.items()):
                wrapper = depth == 0 and key in WRAPPERS and isinstance(inner, dict)
                joined = ".".join(filter(None, (prefix, "" if wrapper else str(key)[:1000])))
                todo.append((joined, inner, depth + 1))
    raise ForgetError(f"'{name}' holds more than {MAX_TENSORS} entries: give the weights alone.")


def _whole(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, unless its shape claims more numbers than the file has."""
    strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not strided or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise _damaged(name, f"{key:.60} claims {list(tensor.shape)}")
    return tensor.detach()
