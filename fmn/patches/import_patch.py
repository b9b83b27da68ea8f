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
from ..models.transformers import BY_KEY, Transformer
from ..text import printable
from .file_kind import is_lora, kind_of
from .foreign_file import ForeignFile, read_folder, read_foreign
from .foreign_lora import read_lora
from .metadata import base_info, stamp
from .patch import ForgetPatch
from .weight_difference import (
    Difference,
    WeightFile,
    difference,
    families_of_weights,
)

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
    base: str | Path | ForeignFile | None = None,
    family: str | None = None,
    rank: int = 0,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Read an eraser of any tool.

    Args:
        path: a LoRA, a file of edited weights, a checkpoint, or a folder.
        concepts: what it forgets, by the user's word.
        base: the model it was made from, a checkpoint or folder or its weights; needed for edited
            weights.
        family: key of ``FAMILIES`` or of a transformer; None finds out.
        rank: of each layer's change of edited weights; 0 cuts at the gap of the spectrum.

    Raises:
        ForgetError: what it is cannot be imported, or something is missing; the message says what.
    """
    file = open_eraser(path)
    if not concepts:
        raise ForgetError(
            f"What '{file.name}' forgets is not known: name it (--concept), perhaps "
            f'"{guess_concept(file)}".'
        )
    wanted = _family(family)
    if is_lora(file.tensors):
        lora = read_lora(file, wanted)
        flow = {} if lora.family.known else {"base.prediction": "flow"}  # all transformers here
        notes = _unused(lora.unused)
        return _patch(file, lora.family, lora.changes, concepts, "LoRA", notes, flow)
    if isinstance(wanted, Transformer):
        raise ForgetError(
            f"'{file.name}' is no LoRA, and nothing else can be imported for {wanted.title}: save "
            "the eraser as a LoRA."
        )
    edited = WeightFile(file)
    if base is not None and not isinstance(base, ForeignFile):
        base = open_eraser(base)
    first = None if base is None else WeightFile(base)
    found = wanted or _identified(edited, first)
    if first is None:
        raise ForgetError(
            f"'{file.name}' holds edited weights, not changes: give the model that it was made "
            "from as the base (--base)."
        )
    change = difference(edited, first, found, rank, on_layer)
    info: dict[str, object] = {"truncation_error": change.lost}
    mark = _fingerprint(first, found)
    if mark:
        info |= base_info(mark)
    imported = {"not_held": change.not_held, "not_compared": change.not_compared}
    return _patch(
        file, found, change.changes, concepts, "edited weights", _notes(change), info, imported
    )


def _notes(change: Difference) -> list[str]:
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
    if change.not_compared:
        notes.append(f"{change.not_compared} tensors have other names in the base: not compared")
    if change.coarse_base and not change.unchanged and change.lost > 0.01:
        notes.append(
            "the base has fewer bits than the file: if the eraser began with a finer copy of it, "
            "the rounding is in the change; give that copy"
        )
    return notes


def open_eraser(path: str | Path) -> ForeignFile:
    """A file or folder that may be an eraser, or its base.

    Raises:
        ForgetError: as ``read_foreign`` and ``read_folder``.
    """
    path = Path(path)
    return read_folder(path) if path.is_dir() else read_foreign(path)


def guess_concept(file: ForeignFile) -> str:
    """What a file's name or metadata suggests that it forgets, for the user to confirm."""
    for key in ("prompts", "ss_output_name", "modelspec.title"):
        if file.metadata.get(key):
            return printable(file.metadata[key])[:60].removeprefix("forget ")
    words = NOISE.sub(" ", re.sub(r"[_\-.]+", " ", Path(file.name).stem))
    return printable(" ".join(words.split()))[:60] or "dog"


def _family(key: str | None) -> Family | Transformer | None:
    known: dict[str, Family | Transformer] = {**FAMILIES, **BY_KEY}
    if key is not None and key not in known:
        raise ForgetError(f"There is no family '{key:.40}': use {', '.join(known)}.")
    return None if key is None else known[key]


def _identified(edited: WeightFile, base: WeightFile | None) -> Family:
    fits = families_of_weights(edited, FAMILIES.values())
    if len(fits) > 1 and base is not None:  # a text encoder, or layers that two families share
        fits = families_of_weights(base, fits) or fits
    if len(fits) == 1:
        return fits[0]
    name = edited.file.name
    if fits:
        titles = " and ".join(one.title for one in fits)
        raise ForgetError(f"'{name}' fits {titles}: say which by the base or --family.")
    raise ForgetError(
        f"'{name}' is {kind_of(edited.file.tensors) or 'no known file'}, and nothing to import: "
        "give an eraser's LoRA, its edited U-Net or text encoder weights, or its folder."
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
    imported: dict | None = None,
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
            **(imported or {}),
        },
    }
    return Imported(ForgetPatch(family, changes, record | (info or {})), kind, tuple(notes))
