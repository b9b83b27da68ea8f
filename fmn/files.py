"""Writing files so that a failure leaves nothing half-written, and names given for them."""

import os
import secrets
from contextlib import suppress
from itertools import count
from pathlib import Path

from safetensors import SafetensorError

from .errors import ForgetError

# The demo model, its judges and control pictures: in a wheel among the assets (setup.py), else in
# the clone's demo/.
DEMO_FOLDER = Path(__file__).parent / "assets" / "demo"
if not DEMO_FOLDER.is_dir():
    DEMO_FOLDER = Path(__file__).parents[1] / "demo"
MAX_STRENGTH = 100
STATE_ENDING = ".fmn-train"  # of a training's state: no ending that loaders of models list


def write_whole(path, write):
    """Call ``write`` with the name of a temporary file beside ``path``, then rename it to ``path``.

    Raises:
        ForgetError: the folder cannot be written to, or the disk is full. Nothing is left behind.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(temporary, "xb").close()
        mode = os.stat(temporary).st_mode  # what the user's umask gives; safetensors would not ask
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


def _temporary(path):
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _not_saved(path, error):
    reason = getattr(error, "strerror", None) or str(error)
    return ForgetError(
        f"'{path.name}' could not be saved in {path.parent} ({reason}): "
        "free some space or choose a folder you can write to."
    )


def check_file(path, ending, replaces=False):
    """Refuse the name of a file that could not be written, before there is work to lose.

    Args:
        ending: that it has to have, such as ".safetensors".
        replaces: a file of that name may be there.

    Raises:
        ForgetError: another ending, a folder, a file that is there, or no place to write to.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ForgetError(f"'{path}' is a folder: name a file in it, as {path / ('dog' + ending)}.")
    if path.suffix != ending:
        raise ForgetError(
            f"'{path.name:.80}' does not end in {ending}, which is all that is written here: name "
            f"it {path.stem + ending:.90}."
        )
    check_new(path) if not replaces else _check_place(path)


def check_new(path):
    """Refuse a file or folder that is there, or could not be made; see ``check_file``."""
    path = Path(path)
    if os.path.lexists(path):
        raise ForgetError(f"'{path}' exists already: give another name, or move it away.")
    _check_place(path)


def check_folder(path):
    """Refuse a folder that cannot be made or written into, before there is work to lose."""
    path = Path(path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ForgetError(f"'{path}' is a file, and the results are several: name a folder.")
    _check_place(path / "result")


def _check_place(path):
    """Try whether the folder of a file, or the one that it would be made in, can be written."""
    folder = next(each for each in path.parents if os.path.lexists(each))
    temporary = _temporary(folder / path.name)
    try:
        open(temporary, "xb").close()
        temporary.unlink()
    except (OSError, ValueError) as error:
        raise _not_saved(path, error) from error


def free_name(path):
    """The path, or if it is taken the first free one of NAME_2, NAME_3 and so on."""
    path = Path(path)
    if not os.path.lexists(path):
        return path
    numbered = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return next(each for each in numbered if not os.path.lexists(each))


def file_and_strength(text):
    """FILE or FILE:STRENGTH -> (file, strength); 1 unless given."""
    file, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:  # no strength; a colon is part of the name
        return text, 1.0
    if not abs(value) <= MAX_STRENGTH:  # nor what is no number
        raise ForgetError(
            f"The strength in '{text}' is {strength}: use a number such as 0.8, from "
            f"-{MAX_STRENGTH} to {MAX_STRENGTH}."
        )
    return (file, value) if file else (text, 1.0)


def chosen_files(lines, find):
    """Files of lines FILE, PATTERN, FILE:STRENGTH or PATTERN:STRENGTH: {file: strength}.

    Where several lines match a file, their strengths add up, as if it were put on by each.

    Args:
        find: function from a pattern to the files that match it.
    """
    found = {}
    for line in lines:
        pattern, strength = file_and_strength(line)
        files = find(pattern)
        if not files:
            raise ForgetError(
                f"No patch file matches '{pattern:.200}': check the name, or write a pattern such "
                "as batch/*."
            )
        found |= {file: found.get(file, 0.0) + strength for file in files}
    return found


FORBIDDEN = '<>:"/\\|?*'
RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in "123456789"
}
MAX_BYTES = 180  # systems take 255, and longer names lie beside it


def checked_stem(name, suffix):
    """The name of a file without its suffix, which may be there or not.

    Raises:
        ForgetError: not a text, empty, too long, a path, or a name that some system refuses.
    """
    if not isinstance(name, str):
        raise ForgetError("A new name has to be a text: type one.")
    stem = name.strip()
    if stem.lower().endswith(suffix):
        stem = stem[: -len(suffix)].rstrip()
    bad = next((letter for letter in stem if not letter.isprintable() or letter in FORBIDDEN), None)
    if bad is not None:
        raise ForgetError(
            f"The name {name!r:.80} has the letter {bad!r}, which file names may not have: use "
            "letters, digits, spaces, - and _; a file stays in its folder."
        )
    if not stem or stem[0] == "." or stem[-1] == ".":
        raise ForgetError(
            f"The name {name!r:.80} is empty, or begins or ends with a dot: choose another."
        )
    if stem.split(".")[0].strip().lower() in RESERVED:
        raise ForgetError(f"Windows keeps the name {name!r:.80} for itself: choose another.")
    if len(stem.encode()) > MAX_BYTES:
        raise ForgetError(
            f"The name {name!r:.40}... has more than {MAX_BYTES} bytes: choose a shorter one."
        )
    return stem
