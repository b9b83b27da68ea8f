"""The record in a patch file's header, read as text from a stranger."""

import json

from ..errors import ForgetError

FORMAT = "1"
MAX_HEADER = 16 << 20  # bytes; SDXL's full header of tensor names is below 1 MiB
THUMBNAIL = "modelspec.thumbnail"  # a picture as a data URI
INFO_TYPES = {
    "concepts": list, "method": str, "settings": dict, "base.fingerprint": str,
    "base.prediction": str, "loss": dict, "truncation_error": (int, float),
    "rounding_error": (int, float), "date": str, "version": str, "recipe": str,
    "merged": list, "scores": dict, "measured": dict, "imported": dict,
}  # fmt: skip


def info_of(path, metadata):
    """Our part of the header, checked.

    Raises:
        ForgetError: it is no JSON, or of other kinds than we write.
    """
    info = {"concepts": []}
    try:
        for key, value in metadata.items():
            name = key.removeprefix("fmn.")
            if key.startswith("fmn.") and name in INFO_TYPES:
                info[name] = json.loads(value)
                if not isinstance(info[name], INFO_TYPES[name]):
                    raise TypeError(name)
        texts = [concept[part] for concept in info["concepts"] for part in ("name", "kind")]
        for concept in info["concepts"]:
            texts += [concept.get("anchor", ""), *concept.get("aliases", [])]
            if not isinstance(concept.get("aliases", []), list):
                raise TypeError("aliases")
        numbers = [info["loss"][part] for part in ("first", "last", "steps") if info.get("loss")]
        numbers += [info[part] for part in ("truncation_error", "rounding_error") if part in info]
        for part in info.get("merged", []):
            texts += [part["method"], *part["concepts"]]
            numbers.append(part["strength"])
        if "measured" in info:
            measured = info["measured"]
            texts += [measured[part] for part in ("suite", "judge", "base", "date")]
            texts += measured["targets"]
            if not isinstance(measured["targets"], list):
                raise TypeError("targets")
            numbers.append(measured["count"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ForgetError(
            f"The metadata of '{path.name}' is damaged ({type(error).__name__}): get it again."
        ) from error
    if not all(isinstance(text, str) for text in texts) or not all(map(is_number, numbers)):
        raise ForgetError(f"The metadata of '{path.name}' has values of the wrong kind.")
    return info


def is_number(value):
    """Whether a value from JSON is a number to reckon with."""
    # JSON allows integers that no float can hold, and NaN.
    return isinstance(value, (int, float)) and abs(value) < 1e300


def check_header_size(path):
    """Refuse a safetensors file whose header cannot be as long as it claims."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise ForgetError(
            f"'{path}' cannot be read ({error.strerror}): check the name and its folder."
        ) from error
    if size < 8 or header > min(size - 8, MAX_HEADER):
        raise ForgetError(
            f"'{path.name}' is cut short or not a safetensors file: its header claims {header} "
            f"bytes, the file has {size} and we read at most {MAX_HEADER}; get it again."
        )
