"""Files: opened as untrusted, written whole or not at all, and named so that every system takes
the name."""

import glob
import hashlib
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError, safe_open

from .downloads import ZIP, AnyPath, first_bytes, reason_of, unreadable
from .errors import ForgetError

File = TypeVar("File")
MAX_HEADER = 16 << 20  # bytes, of small untrusted files; SDXL's names take less than 1 MiB
# The demo model, its judges and control pictures: in a wheel among the assets (setup.py), else in
# the clone's demo/.
DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"
if not DEMO_FOLDER.is_dir():
    DEMO_FOLDER = Path(__file__).parents[1] / "demo"
MAX_STRENGTH = 100
STATE_ENDING = ".fmn-train"  # of a training state; loaders of models do not list this ending
FORBIDDEN = set('<>:"/\\|?*')
RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in "123456789"
}
MAX_NAME = 180  # bytes; systems allow 255, and longer names lie beside it
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".sft", ".gguf")
TEXTS = (".json", ".txt", ".yaml", ".yml", ".csv")


@contextmanager
def open_safetensors(
    path: AnyPath, remedy: str = "get it again", max_header: int = 100_000_000
) -> Iterator[Any]:
    """Open an untrusted safetensors file; its header's length is checked before it is read.

    Args:
        remedy: what a user can do about a damaged file.
        max_header: bytes; safetensors' own limit unless given.

    Yields:
        The handle of ``safetensors.safe_open``, which loads a tensor only when asked to.

    Raises:
        ForgetError: the file is missing, unreadable, damaged, or of another format.
    """
    path = Path(path)
    start = first_bytes(path)
    try:
        header = int.from_bytes(start[:8], "little")
        if header > max_header:
            raise EOFError(f"its header claims {header} bytes, and at most {max_header} are read")
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, EOFError) as error:
        reason = reason_of(path, start, error)
        raise ForgetError(
            f"'{path.name}' is damaged or not a safetensors file ({reason:.100}): {remedy}."
        ) from error


def check_weights(path: Path) -> None:
    """Refuse a file of weights that is something else or cut off, without loading tensors."""
    if path.suffix.lower() == ".safetensors":
        with open_safetensors(path):
            return
    start = first_bytes(path)
    if not start or (start.startswith(ZIP) and not zipfile.is_zipfile(path)):
        raise ForgetError(f"'{path}' is empty or cut off: download it again.")


def check_texts(folder: Path) -> None:
    """Refuse a model's folder in which a text is something else: a loader might not notice."""
    for path in _parts(folder, TEXTS):
        first_bytes(path)


def check_parts(folder: Path) -> None:
    """Refuse a model's folder by the file in it that is something else or cut off; for use after
    a loader has failed, to name the cause."""
    for path in _parts(folder, WEIGHTS):
        check_weights(path)


def _parts(folder: Path, endings: Sequence[str]) -> list[Path]:
    files = sorted((*folder.glob("*"), *folder.glob("*/*")))
    visible = (file for file in files if not file.name.startswith("."))
    return [file for file in visible if file.suffix.lower() in endings and file.is_file()]


def data_hash(file: BinaryIO) -> str:
    """``modelspec.hash_sha256`` of a safetensors file: 0x and SHA-256 of all behind its header."""
    file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return f"0x{digest.hexdigest()}"


def write_whole(path: AnyPath, write: Callable[[Path], object]) -> None:
    """Call ``write`` with the name of a temporary file beside ``path``, then rename it to ``path``.

    Raises:
        ForgetError: the folder cannot be written to, or the disk is full. Nothing is left behind.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(temporary, "xb").close()
        mode = os.stat(temporary).st_mode  # by the user's umask, which safetensors ignores
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_saved(path, error) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _not_saved(path: Path, error: Exception) -> ForgetError:
    reason = getattr(error, "strerror", None) or str(error)
    return ForgetError(
        f"'{path.name}' could not be saved in {path.parent} ({reason}): "
        "free some space or choose a folder you can write to."
    )


def check_file(path: AnyPath, ending: str, replaces: bool = False) -> None:
    """Refuse a file that could not be written, before there is work to lose.

    Args:
        ending: the one that its name must have, such as ".safetensors".
        replaces: a file of that name may exist.

    Raises:
        ForgetError: another ending, a folder, a file that exists, or no place to write to.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ForgetError(f"'{path}' is a folder: name a file in it, as {path / ('dog' + ending)}.")
    if path.suffix.lower() != ending:
        known = path.suffix.lower() in (*WEIGHTS, *PICTURES, *TEXTS)
        raise ForgetError(
            f"'{path.name:.80}' does not end in {ending}, the only kind written here: name it "
            f"{(path.stem if known else path.name) + ending:.90}."
        )
    check_new(path) if not replaces else _check_place(path)


def check_new(path: AnyPath) -> None:
    """Refuse a file or folder that exists or could not be made; see ``check_file``."""
    path = Path(path)
    if os.path.lexists(path):
        raise ForgetError(f"'{path}' exists already: give another name, or move it away.")
    _check_place(path)


def check_folder(path: AnyPath) -> None:
    """Refuse a folder that cannot be made or written into, before there is work to lose."""
    path = Path(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ForgetError(f"'{path}' is a file, but there are several results: name a folder.")
    _check_place(path / "result")


def _check_place(path: Path) -> None:
    """Write a file into the folder of ``path``, or into the one that it would be made in."""
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    for new in path.relative_to(folder).parts if not os.path.lexists(path) else ():
        check_portable(new)
    temporary = _temporary(folder / path.name)
    try:
        open(temporary, "xb").close()
        temporary.unlink()
    except (OSError, ValueError) as error:
        raise _not_saved(path, error) from error


def free_name(path: AnyPath) -> Path:
    """The path, or if it is taken the first free one of NAME_2, NAME_3 and so on."""
    path = Path(path)
    if not os.path.lexists(path):
        return path
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return next(free for free in numbered if not os.path.lexists(free))


def checked_stem(name: object, suffix: str) -> str:
    """A file's new name without its suffix, which may be given or not.

    Raises:
        ForgetError: no text, or not a name of a file in this folder on every system.
    """
    stem = name.strip() if isinstance(name, str) else ""
    if stem.lower().endswith(suffix):
        stem = stem[: -len(suffix)].rstrip()
    if stem[:1] == "." or not stem.isprintable() or len(stem.encode("utf-8", "replace")) > MAX_NAME:
        raise _refused_name(name)
    check_portable(stem)
    return stem


def check_portable(name: str) -> None:
    """Refuse a name of a file or folder that some system cannot have.

    Windows reserves letters and whole names, drops dots at the end, and takes what follows a colon
    for a stream inside the file; other systems would write what cannot be copied there.
    """
    refused = (
        not name.strip()
        or min(name) < " "
        or set(name) & FORBIDDEN
        or name[-1] in ". "
        or name.split(".")[0].strip().lower() in RESERVED
    )
    if refused:
        raise _refused_name(name)


def _refused_name(name: object) -> ForgetError:
    return ForgetError(
        f"The name {name!r:.80} cannot be used on every system: use letters, digits, spaces, - "
        f"and _, at most {MAX_NAME} bytes, no dot at either end, and no name that Windows "
        "reserves, such as con."
    )


def matching_files(pattern: str, ending: str) -> list[Path]:
    """Files of that ending, in lower case, which a pattern of ``glob`` matches, sorted.

    A plain name, or a pattern that exists as a name, is one file, whether it exists or not.
    """
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    found = next(filter(None, map(glob.glob, readings(pattern))), [])
    return [Path(name) for name in sorted(found) if name.lower().endswith(ending)]


def readings(pattern: str) -> tuple[str, str]:
    """A pattern with ``[`` as a letter, as in the folder "run [2]", and as it is."""
    return pattern.replace("[", "[[]"), pattern


def file_and_strength(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> (file, strength); the strength is 1 unless given."""
    file, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:  # no strength; a colon is part of the name
        return text, 1.0
    if not abs(value) <= MAX_STRENGTH:  # NaN included
        raise ForgetError(
            f"The strength in '{text}' is {strength}: use a number such as 0.8, from "
            f"-{MAX_STRENGTH} to {MAX_STRENGTH}."
        )
    return (file, value) if file else (text, 1.0)


def chosen_files(lines: Iterable[str], find: Callable[[str], Sequence[File]]) -> dict[File, float]:
    """Files of lines FILE, PATTERN, FILE:STRENGTH or PATTERN:STRENGTH -> their strengths.

    The strengths of a file that several lines match add up, as if each line applied it.

    Args:
        find: function from a pattern to the files that match it.
    """
    strengths: dict[File, float] = {}
    for line in lines:
        pattern, strength = file_and_strength(line)
        files = find(pattern)
        if not files:
            raise ForgetError(
                f"No patch file matches '{pattern:.200}': check the name, or write a pattern such "
                "as batch/*."
            )
        strengths |= {file: strengths.get(file, 0.0) + strength for file in files}
    return strengths
