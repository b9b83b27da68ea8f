"""What a list of patches shows of a file, read from its header alone.

All of it is untrusted text, so it is cut to size and cleared of control characters; that a file is
listed does not mean that it is sound. ``patch.load_patch`` checks a file. No tensor is loaded here.
"""

import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import ForgetError
from ..files import MAX_HEADER, data_hash, open_safetensors
from ..models import unknown_family
from ..models.families import FAMILIES
from ..models.interface import SKETCHED
from ..text import printable
from .metadata import FORMAT, THUMBNAIL, Info, is_changed, is_number, read_info
from .scores import MOST_SCORES

MOST_CONCEPTS = 64
LONGEST = 200  # letters of a text

# Why a file cannot be used, in a word; the page has the sentences.
DAMAGED, FOREIGN, NEWER = "damaged", "foreign", "newer"
HIDDEN, UNREADABLE = "hidden", "unreadable"


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in a safetensors header.

    Raises:
        ForgetError: the file is damaged.
        OSError: the file is missing or may not be read.
    """
    open(path, "rb").close()
    with open_safetensors(path, max_header=MAX_HEADER) as file:
        return file.metadata() or {}


def file_is_changed(path: Path) -> bool | None:
    """Whether a patch's weights are others than its record was written for; None: the file does
    not say. The file is read whole, so this is for one patch that is looked at.

    Raises:
        ForgetError: the file cannot be read.
    """
    with open_safetensors(path, max_header=MAX_HEADER) as file, open(path, "rb") as data:
        metadata = file.metadata() or {}
        return metadata.get("fmn.changed") == "true" or is_changed(metadata, data_hash(data))


def describe_file(path: Path, stat: os.stat_result) -> dict[str, Any]:
    """The entry of a file: plain data for JSON, without empty values.

    Args:
        stat: of the file; its time stands in for a date that the header lacks.
    """
    entry = {"size": stat.st_size, "date": int(stat.st_mtime)}
    try:
        metadata = read_metadata(path)
        if metadata.get("fmn.format") != FORMAT:
            return entry | {"problem": NEWER if "fmn.format" in metadata else FOREIGN}
        info = read_info(path.name, metadata)
    except ForgetError:
        return entry | {"problem": DAMAGED}
    return entry | {key: value for key, value in _fields(metadata, info) if value}


def _fields(metadata: Mapping[str, str], info: Info) -> Iterator[tuple[str, object]]:
    yield "concepts", [_concept(concept) for concept in info["concepts"][:MOST_CONCEPTS]]
    yield "method", _text(info.get("method", ""))
    family = metadata.get("fmn.base.family", "")
    unknown = family == unknown_family.KEY
    yield "family", family if family in FAMILIES or unknown else ""
    yield "model", _text(metadata.get("fmn.base.model", "")) if unknown else ""
    yield "base", _text(info.get("base.fingerprint", ""))
    yield "sketch", info.get("base.sketch", [])[:SKETCHED]
    yield "prediction", _text(info.get("base.prediction", ""))
    yield "rank", _text(metadata.get("ss_network_dim", ""))
    yield "loss", [info["loss"]["first"], info["loss"]["last"]] if info.get("loss") else []
    scores = info.get("scores", {}).items()
    scores = [(_text(name), value) for name, value in scores if is_number(value)]
    yield "scores", dict(list(dict(scores).items())[:MOST_SCORES])
    measured = info.get("measured")
    if measured:
        targets = [_text(name) for name in measured["targets"][:MOST_CONCEPTS]]
        yield "measured", [_text(measured["suite"]), targets]
    yield "date", _seconds(info.get("date", ""))
    yield "thumbnail", THUMBNAIL in metadata


def _concept(concept: Mapping[str, Any]) -> list[str]:
    """Name, kind, anchor and aliases as texts; "" for what is missing."""
    aliases = ", ".join(concept.get("aliases", []))
    texts = concept["name"], concept["kind"], concept.get("anchor", ""), aliases
    return [_text(text) for text in texts]


def _text(text: str) -> str:
    return printable(text[:LONGEST])


def _seconds(date: str) -> int | None:
    """Seconds since 1970 of an ISO date; None for anything else."""
    try:
        moment = datetime.fromisoformat(date)
        return int(moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp())
    except (ValueError, OverflowError, OSError):
        return None
