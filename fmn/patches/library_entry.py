"""What a patch file says of itself, from its header alone. Nothing here loads a tensor.

All of it is text from a stranger: it is cut to size and cleared of control characters, and it
proves nothing. ``patch.load_patch`` checks a file.
"""

import json
from datetime import datetime, timezone

from ..errors import ForgetError
from ..models import unknown_family
from ..models.families import FAMILIES
from ..text import printable
from .metadata import FORMAT, MAX_HEADER, THUMBNAIL, info_of, is_number
from .scores import MOST as MOST_SCORES

CHUNK = 1 << 16  # bytes; most headers end before
START = '{"__metadata__":'  # safetensors writes its metadata first
MOST_CONCEPTS = 64
LONGEST = 200  # letters of a text

# Why a file cannot be used, in a word; the page has the sentences.
DAMAGED, FOREIGN, NEWER = "damaged", "foreign", "newer"
HIDDEN, UNREADABLE = "hidden", "unreadable"


def metadata_of(path, size):
    """The strings in a safetensors header; None if there is none that can be read.

    Raises:
        OSError: the file is gone or closed to us.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            return None
        text = file.read(min(length, CHUNK)).decode("utf-8", "replace")
        metadata = _first_value(text)
        if metadata is None:
            file.seek(8)
            metadata = _whole(file.read(length))
    if not isinstance(metadata, dict):
        return None
    return metadata if all(isinstance(value, str) for value in metadata.values()) else None


def _first_value(text):
    """The metadata, if the header begins with it; what follows may be many thousand tensors."""
    if not text.startswith(START):
        return None
    try:
        return json.JSONDecoder().raw_decode(text, len(START))[0]
    except (ValueError, RecursionError):
        return None  # it goes on after this piece, or is damaged: read the whole header


def _whole(header):
    try:
        content = json.loads(header.decode())
    except (ValueError, RecursionError):
        return None
    return content.get("__metadata__", {}) if isinstance(content, dict) else None


def described(path, stat):
    """What a list of patches shows of a file: plain data, JSON-able, without what is empty.

    Args:
        stat: of the file; its time stands in for a date that the file does not tell.
    """
    metadata = metadata_of(path, stat.st_size)
    entry = {"size": stat.st_size, "date": int(stat.st_mtime)}
    if metadata is None:
        return entry | {"problem": DAMAGED}
    if "fmn.format" not in metadata:
        return entry | {"problem": FOREIGN}
    if metadata["fmn.format"] != FORMAT:
        return entry | {"problem": NEWER}
    try:
        info = info_of(path, metadata)
    except ForgetError:
        return entry | {"problem": DAMAGED}
    return entry | {key: value for key, value in _fields(metadata, info) if value}


def _fields(metadata, info):
    yield (
        "concepts",
        [
            [_text(concept["name"]), _text(concept["kind"]), *_more(concept)]
            for concept in info["concepts"][:MOST_CONCEPTS]
        ],
    )
    yield "method", _text(info.get("method", ""))
    family = metadata.get("fmn.base.family", "")
    yield "family", family if family in FAMILIES or family == unknown_family.KEY else ""
    yield "model", _text(metadata.get("fmn.base.model", "")) if family == unknown_family.KEY else ""
    yield "base", _text(info.get("base.fingerprint", ""))
    yield "prediction", _text(info.get("base.prediction", ""))
    yield "rank", _text(metadata.get("ss_network_dim", ""))
    yield "loss", [info["loss"]["first"], info["loss"]["last"]] if info.get("loss") else []
    scores = {
        _text(name): value for name, value in info.get("scores", {}).items() if is_number(value)
    }
    yield "scores", dict(list(scores.items())[:MOST_SCORES])
    measured = info.get("measured")
    yield "measured", measured and [_text(measured["suite"]), _named(measured["targets"])]
    yield "date", _seconds(info.get("date", ""))
    yield "thumbnail", THUMBNAIL in metadata


def _more(concept):
    """Anchor and aliases as texts; "" where there is none."""
    yield _text(concept.get("anchor", ""))
    yield _text(", ".join(concept.get("aliases", [])))


def _named(names):
    return [_text(name) for name in names[:MOST_CONCEPTS]]


def _text(text):
    return printable(text[:LONGEST])


def _seconds(date):
    """Seconds since 1970 of an ISO date; None if it is none, and the file's own time stands."""
    try:
        moment = datetime.fromisoformat(date)
        return int(moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp())
    except (ValueError, OverflowError, OSError):
        return None
