"""Writing files so that a failure leaves nothing half-written."""

import math
import os
import secrets
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import ForgetError


def write_whole(path, write):
    """Call ``write`` with the name of a temporary file beside ``path``, then rename it to ``path``.

    Raises:
        ForgetError: the folder cannot be written to, or the disk is full. Nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
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
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgetError(
            f"'{path.name}' could not be saved in {path.parent} ({reason}): "
            "free some space or choose a folder you can write to."
        ) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def file_and_strength(text):
    """FILE or FILE:STRENGTH -> (file, strength); 1 unless given."""
    file, _, strength = text.rpartition(":")
    try:
        value = float(strength)
    except ValueError:  # no strength; a colon is part of the name
        return text, 1.0
    if not math.isfinite(value):
        raise ForgetError(f"The strength in '{text}' is {strength}: use a number such as 0.8.")
    return (file, value) if file else (text, 1.0)


def chosen_files(lines, find):
    """Files of lines FILE, PATTERN, FILE:STRENGTH or PATTERN:STRENGTH: {file: strength}.

    Where several lines match a file, the last one counts.

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
        found |= dict.fromkeys(files, strength)
    return found
