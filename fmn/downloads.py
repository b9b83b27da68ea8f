"""What is often saved in place of a file that was to be downloaded, by its first bytes."""

import os
import re
from pathlib import Path

from .errors import ForgetError

AnyPath = str | os.PathLike[str]
ZIP = b"PK\x03\x04"
# What is often saved in place of a file: its first bytes -> what it is and what to do.
STAND_INS = (
    (
        rb"version https://(git-lfs|hawser)",
        "a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository, or download "
        "the file",
    ),
    (
        rb"\s*<(!doctype|html|\?xml|head|body|!--)",
        "a web page saved under that name: download the file itself",
    ),
    (
        rb'\s*(\{\s*"(error|message|detail|status)"|(entry|repository|model) not found\b'
        rb"|invalid username or password|access to model )",
        "a server's error message saved under that name: download the file again, signed in if it "
        "asks for that",
    ),
)
# What weights may be in instead of safetensors: first bytes -> name.
OTHER_KINDS = {
    ZIP: "a torch file or zip archive", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle",
    b"GGUF": "a GGUF file", b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive",
    b"\x80\x03": "a pickle", b"\x80\x05": "a pickle", b"Rar!": "a RAR archive",
    b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
    b"\0\5\x16\7": "what macOS keeps beside a file",
}  # fmt: skip


def first_bytes(path: AnyPath) -> bytes:
    """The first 512 bytes of a file, for which something else was often downloaded.

    Raises:
        ForgetError: it cannot be read, or is a Git LFS pointer, a web page or an error message.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise unreadable(path, error) from error
    text = start.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").replace(b"\0", b"")
    for beginning, what in STAND_INS:
        if re.match(beginning, text, re.IGNORECASE):
            raise ForgetError(f"'{path.name}' is {what}.")
    return start


def reason_of(path: Path, start: bytes, error: Exception) -> str:
    """Why a file is no safetensors file: as far as it is known, in plain words."""
    if len(start) < 8:
        return "it is empty" if not start else f"it has only {len(start)} bytes"
    kind = next((kind for magic, kind in OTHER_KINDS.items() if start.startswith(magic)), None)
    if start[8:9] not in (b"{", b""):
        return f"it is {kind}" if kind else "it does not begin like one"
    if "header length" in str(error) or "not fully covered" in str(error):
        return f"its header does not fit its {os.stat(path).st_size} bytes: it may be cut off"
    return str(error).removeprefix("Error while deserializing header: ")


def unreadable(path: Path, error: Exception) -> ForgetError:
    """The error for a file that the system does not give."""
    reason = getattr(error, "strerror", None) or error
    return ForgetError(f"'{path}' cannot be read ({reason}): check the name and its folder.")
