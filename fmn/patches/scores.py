"""Scores of a bench kept in the patch's own file, where lists of patches show them.

Only the header changes; the weights stay as they are.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save

from ..errors import ForgetError
from ..files import MAX_HEADER, data_hash, open_safetensors, write_whole
from .metadata import HASH, Info, is_number, read_info

# Columns of a bench that are kept -> their names in the file. All but M-Score are shares, 0 to 1.
NAMES = {
    "UA": "UA", "IRA": "IRA", "CRA": "CRA", "HM": "mean", "mscore": "M-Score",
    "inversion": "inversion", "ring_a_bell": "Ring-A-Bell", "completion": "completion",
    "noise": "noise", "classifier": "classifier", "inpainting": "inpainting", "relearn": "relearn",
}  # fmt: skip
SHARES = set(NAMES.values()) - {"M-Score"}
DIGITS = 4
MOST_SCORES = 12  # that are shown
SCORES = "scores", "measured"  # keys of a record


class Setup(Protocol):
    """``bench.running.cells.Setup``."""

    @property
    def judge(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def key(self) -> str: ...


class Source(NamedTuple):
    """The file that a patch is the content of, and ``tensor_hash`` of its tensors.

    Attributes:
        bound: the file has a hash of its weights, which tells whether the record is theirs.
    """

    path: Path
    weights: str
    bound: bool = True


def tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of a file's tensors alone: the same for a patch made again on another day."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def bytes_of(source: Source) -> bytes:
    """The file's present content.

    Raises:
        ForgetError: the file is missing or damaged, or has other weights by now.
    """
    _read(source)
    return source.path.read_bytes()


def _read(source: Source) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of the file, which has to be the patch still."""
    with open_safetensors(source.path, "load it again", MAX_HEADER) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    if tensor_hash(tensors) != source.weights or "fmn.format" not in metadata:
        raise ForgetError(
            f"'{source.path.name}' has been replaced since the patch was loaded, so no scores are "
            "written into it: load it again."
        )
    return tensors, metadata


def check_targets(name: str, info: Info, targets: Sequence[str]) -> None:
    """Refuse to keep scores of anything but what a patch forgets, or in another one's record.

    Args:
        name: of the patch, for the message. info: its record. targets: names.
    """
    if info.get("changed"):
        raise ForgetError(
            f"No scores are written into '{name}', as another program changed its weights: import "
            "it first (python -m fmn import), so that its record is its own."
        )
    concepts = [concept["name"] for concept in info["concepts"]]
    others = [target for target in targets if target not in concepts]
    if others:
        raise ForgetError(
            f"'{name}' does not forget '{others[0]:.80}', so no scores of that are written into "
            f"it: measure it on {', '.join(concepts)[:200]} only, or do not write scores."
        )


def scores_of(
    summary: Mapping[str, Any], setup: Setup, method: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """The scores of a method in a bench's summary by their names, and how they were measured.

    Args:
        summary: of ``bench.reporting.summary``. method: its name there.
    """
    row = [mean for mean in summary["means"] if mean["method"] == method][-1]  # of all targets
    values = {key: cell["value"] for key, cell in row["values"].items() if key in NAMES}
    scores = {NAMES[key]: round(values[key], DIGITS) for key in NAMES if key in values}
    kind, _, folder = setup.judge.partition(":")  # others need not know where the judge lies
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


def write_scores(source: Source, scores: Mapping[str, float], measured: Mapping[str, Any]) -> None:
    """Write scores into a patch's header; the weights stay as they are, bit for bit.

    Older scores stay beside the new ones if they were measured alike, and go otherwise. If nothing
    is new, the file is not touched.

    Args:
        scores, measured: see ``scores_of``.

    Raises:
        ForgetError: see ``bytes_of``; or the file cannot be written.
    """
    tensors, metadata = _read(source)
    info = read_info(source.path.name, metadata)
    before, old = info.get("scores", {}), info.get("measured", {})
    if old | {"date": ""} == {**measured, "date": ""}:
        scores = {**before, **scores}
        if scores == before:
            return
    metadata |= {"fmn.scores": json.dumps(scores), "fmn.measured": json.dumps(measured)}
    metadata.setdefault(HASH, data_hash(BytesIO(save(tensors))))
    content = save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER:
        raise ForgetError(
            f"The header of '{source.path.name}' has no room for scores ({length} bytes, at most "
            f"{MAX_HEADER} are read): measure without writing them."
        )
    write_whole(source.path, lambda file: file.write_bytes(content))


def scores_text(info: Info) -> list[str]:
    """The scores in a patch's record, and how they were measured: two lines of text or none."""
    known = [(name, value) for name, value in info.get("scores", {}).items() if is_number(value)]
    scores = [f"{name} {_number(name, value)}" for name, value in known[:MOST_SCORES]]
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


def _number(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name in SHARES and 0 <= value <= 1 else f"{value:.4g}"
