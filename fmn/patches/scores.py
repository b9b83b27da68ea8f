"""Figures of a bench kept in the patch's own file, where lists of patches show them.

Only the header is written anew. What follows it, the weights, is copied as it is.
"""

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from ..errors import ForgetError
from ..files import write_whole
from .metadata import MAX_HEADER, info_of, is_number

# Columns of a bench that are kept, and the names they get. All but M-Score are shares, 0 to 1.
NAMES = {
    "UA": "UA", "IRA": "IRA", "CRA": "CRA", "HM": "mean", "mscore": "M-Score",
    "inversion": "inversion", "ring_a_bell": "Ring-A-Bell", "completion": "completion",
    "noise": "noise", "classifier": "classifier", "inpainting": "inpainting", "relearn": "relearn",
}  # fmt: skip
SHARES = set(NAMES.values()) - {"M-Score"}
DIGITS = 4
MOST = 12  # that are shown


class Source(NamedTuple):
    """The file that a patch is the content of.

    Attributes:
        weights: hash of all behind the header.
    """

    path: Path
    weights: str


def source_of(path):
    """The ``Source`` of a patch that was read from a file, or written to it."""
    path = Path(path).resolve()  # a link stays one
    return Source(path, _hash(_read(path)))


def bytes_of(source):
    """The file as it is now.

    Raises:
        ForgetError: it is gone, or has other weights.
    """
    data = _read(source.path)
    if _hash(data) != source.weights:
        raise _replaced(source)
    return data


def _replaced(source):
    return ForgetError(
        f"'{source.path.name}' is not the patch any more that it was when it was loaded, so no "
        "scores are written into it: load it again."
    )


def check_targets(name, concepts, targets):
    """Refuse to keep figures about anything but what a patch forgets.

    Args:
        name: of the patch, for the message. concepts, targets: names.
    """
    others = [target for target in targets if target not in concepts]
    if others:
        raise ForgetError(
            f"'{name}' does not forget '{others[0]:.80}', so no scores of that are written into "
            f"it: measure it on {', '.join(concepts)[:200]} only, or do not write scores."
        )


def scores_of(summary, setup, method):
    """What a bench found: names and numbers, and what was measured.

    Args:
        summary: of ``bench.summary``. setup: ``bench.cells.Setup``. method: its name there.
    """
    row = [mean for mean in summary["means"] if mean["method"] == method][-1]  # of all targets
    values = {key: each["value"] for key, each in row["values"].items() if key in NAMES}
    scores = {NAMES[key]: round(values[key], DIGITS) for key in NAMES if key in values}
    kind, _, folder = setup.judge.partition(":")  # where it lies is nobody's business
    return scores, {
        "suite": summary["suite"],
        "targets": row["targets"],
        "judge": f"{kind}:{Path(folder).name}" if folder else kind,
        "count": setup.count,
        "seed": setup.seed,
        "base": setup.fingerprint,
        "setup": setup.key(),
        "version": summary["version"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_scores(source, scores, measured):
    """Write figures into a patch's header; the weights stay as they are, bit for bit.

    Figures that are there already stay beside the new ones if they were measured alike, and go
    if not. If nothing is new, the file is not touched.

    Args:
        source: ``Source``. scores, measured: of ``scores_of``.

    Raises:
        ForgetError: see ``bytes_of``; or the file cannot be written.
    """
    data = bytes_of(source)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if "fmn.format" not in metadata:  # only the header was written anew, by another program
        raise _replaced(source)
    info = info_of(source.path, metadata)
    before, old = info.get("scores", {}), info.get("measured", {})
    if old | {"date": ""} == measured | {"date": ""}:
        scores = before | scores
        if scores == before:
            return
    metadata |= {"fmn.scores": json.dumps(scores), "fmn.measured": json.dumps(measured)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns it
    if len(text) > MAX_HEADER:
        raise ForgetError(
            f"The header of '{source.path.name}' has no room for scores ({len(text)} bytes, at "
            f"most {MAX_HEADER} are read): measure without writing them."
        )
    parts = len(text).to_bytes(8, "little"), text, data[8 + length :]
    write_whole(source.path, lambda file: Path(file).write_bytes(b"".join(parts)))


def scores_text(info):
    """The scores in a patch's record, and what was measured: two lines of text or none."""
    found = [(name, value) for name, value in info.get("scores", {}).items() if is_number(value)]
    scores = [f"{name} {_number(name, value)}" for name, value in found[:MOST]]
    if not scores:
        return []
    lines, measured = [f"scores: {', '.join(scores)}"], info.get("measured")
    if measured:
        lines.append(
            f"measured: {measured['suite']}: {', '.join(measured['targets'])}; "
            f"{measured['count']} pictures a question, judge {measured['judge']}, "
            f"base {measured['base']}, {measured['date']}"
        )
    return lines


def _number(name, value):
    return f"{100 * value:.0f} %" if name in SHARES and 0 <= value <= 1 else f"{value:.4g}"


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ForgetError(
            f"'{path}' cannot be read ({error.strerror}): if it was moved, load it again."
        ) from error


def _hash(data):
    length = int.from_bytes(data[:8], "little")
    return hashlib.sha256(memoryview(data)[8 + length :]).hexdigest()
