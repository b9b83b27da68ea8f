"""Other tools' erasers as forget patches: LoRAs, partial U-Nets, checkpoints, folders.

The result holds the same change as far as low ranks can, says where it came from, and claims
nothing else: concepts are those the user names, the base is unknown unless it was compared, and
scores are not taken over.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..concepts.concept import Concept
from ..errors import ForgetError
from ..models.families import FAMILIES, Family, layers
from ..models.interface import Fingerprint, fingerprint
from ..text import printable
from .file_kind import is_lora, kind_of
from .foreign_file import ForeignFile, read_folder, read_foreign
from .foreign_lora import read_lora
from .metadata import base_info, stamp
from .patch import ForgetPatch
from .weight_difference import WeightFile, difference, family_of_weights, open_weights

MAX_METADATA = 8_000  # letters of the original metadata that are kept
# Words of file names that say how it was made rather than what it forgets.
NOISE = re.compile(
    r"(?i)\b(esd|uce|rece|mace|speed|spm|leco|lora|unet|erased?|forget|concept|slider|alpha|rank|"
    r"x|u|strict|noxattn|xattn|last|final|delta|diffusers|model|weights?|[vr]?\d[\d.]*)\b"
)


@dataclass(frozen=True)
class Imported:
    """A patch and what a user should know of how it was read."""

    patch: ForgetPatch
    kind: str
    notes: tuple[str, ...]


def import_patch(
    path: str | Path,
    concepts: Sequence[Concept],
    base: str | Path | None = None,
    family: str | None = None,
    rank: int = 0,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Read an eraser of any tool.

    Args:
        path: a LoRA, a file of edited weights, a checkpoint, or a diffusers folder.
        concepts: what it forgets, by the user's word.
        base: the model it was made from, a checkpoint or folder; needed for edited weights.
        family: key of ``FAMILIES``; None finds out.
        rank: of each layer's change of edited weights; 0 cuts at the gap of the spectrum.

    Raises:
        ForgetError: what it is cannot be imported, or something is missing; the message says what.
    """
    path = Path(path)
    file = read_folder(path) if path.is_dir() else read_foreign(path)
    if not concepts:
        raise ForgetError(
            f"What '{path.name}' forgets is not known: name it with --concept, perhaps "
            f'"{guess_concept(file)}".'
        )
    wanted = _family(family)
    if is_lora(file.tensors):
        lora = read_lora(file.name, file.tensors, wanted)
        notes = _unused(lora.unused)
        return _patch(file, lora.family, lora.changes, concepts, "LoRA", notes)
    edited = WeightFile(file)
    found = _identified(file, edited, wanted)
    if base is None:
        raise ForgetError(
            f"'{path.name}' holds edited weights, not changes: name the model it was made from "
            "with --base, a checkpoint or a diffusers folder."
        )
    first = open_weights(base)
    change = difference(edited, first, found, rank, on_layer)
    info: dict[str, object] = {"truncation_error": change.lost}
    mark = _fingerprint(first, found)
    if mark:
        info |= base_info(mark)
    notes = [
        f"{len(change.changes)} layers differ from the base, {change.unchanged} do not; "
        f"ranks {min(change.ranks)} to {max(change.ranks)}",
        f"lost by cutting to low rank: {change.lost:.2%} of the change",
    ]
    if change.not_held > 0:
        notes.append(
            f"norms, biases and embeddings hold {change.not_held:.2%} of the squared change, which "
            "a LoRA cannot hold"
        )
    return _patch(file, found, change.changes, concepts, "edited weights", notes, info)


def guess_concept(file: ForeignFile) -> str:
    """What a file's name or metadata suggests that it forgets, for the user to confirm."""
    for key in ("prompts", "ss_output_name", "modelspec.title"):
        if file.metadata.get(key):
            return printable(file.metadata[key])[:60].removeprefix("forget ")
    words = NOISE.sub(" ", re.sub(r"[_\-.]+", " ", Path(file.name).stem))
    return printable(" ".join(words.split()))[:60] or "dog"


def _family(key: str | None) -> Family | None:
    if key is None:
        return None
    if key not in FAMILIES:
        raise ForgetError(f"There is no family '{key:.40}': use {', '.join(FAMILIES)}.")
    return FAMILIES[key]


def _identified(file: ForeignFile, weights: WeightFile, wanted: Family | None) -> Family:
    if wanted:
        return wanted
    fits = family_of_weights(weights, FAMILIES)
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ForgetError(
            f"'{file.name}' fits {' and '.join(one.title for one in fits)}: say which with "
            "--family."
        )
    raise ForgetError(
        f"'{file.name}' is {kind_of(file.tensors) or 'no known file'}, and nothing to import: give "
        "an eraser's LoRA, its edited U-Net or text encoder weights (with --family if it changes "
        "the text encoder alone), or its diffusers folder."
    )


def _fingerprint(base: WeightFile, family: Family) -> Fingerprint | None:
    """The base's fingerprint, or None if it lacks keys or values of cross-attention."""
    weights = {layer: base.weight(layer) for layer in layers(family) if layer.is_key_or_value}
    known = {layer: weight for layer, weight in weights.items() if weight is not None}
    return fingerprint(family, known.__getitem__) if len(known) == len(weights) else None


def _unused(keys: list[str]) -> list[str]:
    if not keys:
        return []
    return [f"{len(keys)} tensors are no layers of this family and were left out: {keys[0]:.80}"]


def _patch(
    file: ForeignFile,
    family: Family,
    changes: dict,
    concepts: Sequence[Concept],
    kind: str,
    notes: Sequence[str],
    info: dict | None = None,
) -> Imported:
    original = "\n".join(f"{key}: {value}" for key, value in sorted(file.metadata.items()))
    record = {
        "concepts": [concept.describe() for concept in concepts],
        "method": "import",
        "settings": {},
        "loss": {},
        **stamp(),
        "imported": {
            "kind": kind,
            "file": printable(file.name)[:200],
            "sha256": file.sha256,
            "metadata": printable(original.replace("\n", "; "))[:MAX_METADATA],
        },
    }
    return Imported(ForgetPatch(family, changes, record | (info or {})), kind, tuple(notes))
