"""File names that every system takes."""

from .errors import ForgetError

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
