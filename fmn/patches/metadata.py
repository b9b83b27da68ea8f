"""The record in a patch file's header, our ``fmn.*`` keys: made, and read as untrusted text."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from .. import __version__
from ..concepts.concept import Concept
from ..errors import ForgetError
from ..models.interface import Model

Info = dict[str, Any]  # plain data for JSON; ``INFO_TYPES`` lists the keys
FORMAT = "1"
THUMBNAIL = "modelspec.thumbnail"  # a picture as a data URI
# Relative distances: bfloat16 rounds by 0.002, 8 bits by 0.02 to 0.06; fine-tunes differ by more.
COPY, NEAR = 0.004, 0.08
BASE = "base.fingerprint", "base.sketch"
OTHER = "another base of this family"
PRECISION = "a copy of this base in another precision"
HASH = "modelspec.hash_sha256"  # of ``files.data_hash``
CHANGED = (
    "the weights are not those that the record was written for: another program changed the file, "
    "so its scores do not count and the rest may be wrong"
)
INFO_TYPES: dict[str, type | tuple[type, ...]] = {
    "concepts": list, "method": str, "settings": dict, "base.fingerprint": str,
    "base.sketch": list, "base.prediction": str, "loss": dict, "truncation_error": (int, float),
    "rounding_error": (int, float), "date": str, "version": str, "recipe": str,
    "merged": list, "scores": dict, "measured": dict, "imported": dict,
    "changed": bool,
}  # fmt: skip


def new_info(
    model: Model, fingerprint: str, method: str, settings: Mapping[str, Any],
    concepts: Sequence[Concept], losses: Sequence[float], truncation_error: float,
) -> Info:  # fmt: skip
    """The record that goes into a patch file.

    Args:
        truncation_error: largest relative error of the reduction to low rank, over layers.
    """
    return {
        "concepts": [concept.describe() for concept in concepts],
        "method": method,
        "settings": settings,
        **base_info(fingerprint),
        "base.prediction": model.prediction,
        "loss": loss_info(losses),
        "truncation_error": truncation_error,
        **stamp(),
    }


def base_info(fingerprint: str) -> Info:
    """The record of a base, by what its model's ``fingerprint`` gave."""
    sketch = list(getattr(fingerprint, "sketch", ()))
    return {"base.fingerprint": str(fingerprint)} | ({"base.sketch": sketch} if sketch else {})


def other_base(first: Info, second: Info) -> str:
    """How the bases of two records differ, to follow "made on"; "" for the same base."""
    if first.get("base.fingerprint") == second.get("base.fingerprint"):
        return ""
    if "base.fingerprint" not in first:
        return "an unknown base"
    sketches = [info.get("base.sketch", []) for info in (first, second)]
    count = len(sketches[0])
    if not all(sketches) or count != len(sketches[1]):
        return "another base of this family, or a copy in another precision"
    distance = math.dist(*sketches) / count**0.5
    if distance < COPY:
        return PRECISION
    return "a near relative of this base, such as an 8-bit copy" if distance < NEAR else OTHER


def loss_info(losses: Sequence[float]) -> dict[str, float]:
    """The record of a training's losses; empty if there were none."""
    return {"first": losses[0], "last": losses[-1], "steps": len(losses)} if losses else {}


def stamp() -> dict[str, str]:
    """The record of the time, and of the version that made the file."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "version": __version__}


def read_info(name: str, metadata: Mapping[str, str]) -> Info:
    """Our part of the header, checked.

    Args:
        name: of the file, for messages.

    Raises:
        ForgetError: invalid JSON, or values of other types than we write.
    """
    info: Info = {"concepts": []}
    try:
        for key, value in metadata.items():
            part = key.removeprefix("fmn.")
            if key.startswith("fmn.") and part in INFO_TYPES:
                info[part] = json.loads(value)
                if not isinstance(info[part], INFO_TYPES[part]):
                    raise TypeError(part)
        texts, numbers = _values(info)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ForgetError(
            f"The metadata of '{name}' is damaged ({type(error).__name__}): get it again."
        ) from error
    if not all(isinstance(text, str) for text in texts) or not all(map(is_number, numbers)):
        raise ForgetError(f"The metadata of '{name}' has values of the wrong type: get it again.")
    return info


def is_changed(metadata: Mapping[str, str], digest: str) -> bool | None:
    """Whether a file's weights are others than its record was written for; None: it does not say.

    Args:
        digest: of ``files.data_hash``.
    """
    if HASH in metadata:
        return metadata[HASH].lower().removeprefix("0x") != digest.removeprefix("0x")
    return True if "sshs_model_hash" in metadata else None  # kohya's tools add it, we never did


def _values(info: Info) -> tuple[list[object], list[object]]:
    """The values in a record that have to be texts, and those that have to be numbers."""
    texts = [concept[part] for concept in info["concepts"] for part in ("name", "kind")]
    for concept in info["concepts"]:
        texts += [concept.get("anchor", ""), *concept.get("aliases", [])]
        if not isinstance(concept.get("aliases", []), list):
            raise TypeError("aliases")
    numbers = [info["loss"][part] for part in ("first", "last", "steps") if info.get("loss")]
    numbers += info.get("base.sketch", [])
    numbers += [info[part] for part in ("truncation_error", "rounding_error") if part in info]
    for patch in info.get("merged", []):
        texts += [patch["method"], *patch["concepts"]]
        numbers.append(patch["strength"])
    if "measured" in info:
        measured = info["measured"]
        texts += [measured[part] for part in ("suite", "judge", "base", "date")]
        texts += measured["targets"]
        if not isinstance(measured["targets"], list):
            raise TypeError("targets")
        numbers.append(measured["count"])
    return texts, numbers


def is_number(value: object) -> bool:
    """Whether a value from JSON is a number that a float can hold, and not NaN."""
    return isinstance(value, (int, float)) and abs(value) < 1e300
