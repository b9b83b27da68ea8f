"""Several patches as one: changes added up, or solved for by ``joint``, and cut to a size.

Patches add up as matrices: the merged change of a layer is sum_i s_i up_i @ down_i, which is the
ups and the downs side by side. (Adding ups and downs each would make up products of different
patches that nobody trained.)
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..errors import ForgetError
from ..files import AnyPath
from ..linalg import product_svd
from ..models.families import Family, Layer, layers_by_name
from ..models.unknown_family import UnknownFamily
from .file_check import MAX_RANK
from .lora_keys import ALPHA, PARTS, file_names
from .metadata import BASE, CHANGED, PRECISION, Info, loss_info, other_base, stamp
from .padding import lost_elsewhere
from .patch import Factors, ForgetPatch, file_size, load_patch, square_norm

BYTES = 2  # of a number in a file
ZERO = 1e-12  # of a layer's largest singular value
DIGITS = 64  # bytes by which the record may grow when its numbers change
CANCELLED = 1e-12  # of the squares of what was added up: float64's noise
Sources = Iterable[tuple[ForgetPatch | AnyPath, float]]  # patches or files, and strengths
Strengths = Sequence[tuple[ForgetPatch, float]]


class Merged(NamedTuple):
    """A merged patch, the relative error of cutting it, and notes for the user."""

    patch: ForgetPatch
    error: float
    notes: list[str]

    def report(self) -> str:
        """A few lines of text."""
        patch, size = self.patch, file_size(self.patch) / 1000
        ranks = "-".join(dict.fromkeys((str(patch.ranks[0]), str(patch.ranks[-1]))))
        count = len(patch.info["merged"])
        text = (
            f"{count} patch{'es' * (count != 1)} merged ({patch.info['settings']['how']}): "
            f"{len(patch.changes)} layers, rank {ranks}, {size:.1f} kB; "
            f"cut off: {self.error:.2%} of the change"
        )
        return "\n".join([text, *self.notes])


def merge_patches(sources: Sources, budget: int = 0) -> Merged:
    """Add patches up.

    Args:
        sources: (patch or path of its file, strength) of each.
        budget: bytes that the file may have; 0: as many as it takes.

    Raises:
        ForgetError: see ``open_patches`` and ``build_merged``.
    """
    patches = open_patches(sources)
    settings = {"how": "concatenate", "budget": budget}
    return build_merged(patches, concatenate(patches), settings, budget)


def open_patches(sources: Sources) -> Strengths:
    """Load patches given by their files, and leave out those of strength 0.

    Raises:
        ForgetError: a file is no patch, families or shapes differ, or nothing is left.
    """
    patches = [
        (source if isinstance(source, ForgetPatch) else load_patch(source), float(strength))
        for source, strength in sources
        if strength
    ]
    if not patches:
        raise ForgetError(
            "There is nothing to merge: connect or name patches, at strengths other than 0."
        )
    first = patches[0][0]
    shapes: dict[str, tuple[ForgetPatch, tuple[int, ...]]] = {}
    for patch, _ in patches:
        if not first.family.is_same(patch.family):
            raise ForgetError(
                f"The patch for {_names(first)} is for {first.family.title}, the one for "
                f"{_names(patch)} for {patch.family.title}: merge patches of one family."
            )
        # The shapes of an unknown family's layers are only known from its files.
        for layer in patch.layers:
            other, shape = shapes.setdefault(layer.name, (patch, layer.shape))
            if shape != layer.shape:
                raise ForgetError(
                    f"'{layer.name:.80}' is of shape {list(shape)} in the patch for "
                    f"{_names(other)} and {list(layer.shape)} in the one for {_names(patch)}: "
                    "merge patches made for one model."
                )
    return patches


def _names(patch: ForgetPatch) -> str:
    return ", ".join(patch.concepts)[:80]


def concatenate(patches: Strengths) -> dict[str, Factors]:
    """The sum of patches: layer name -> (up [out, k], down [k, in]) in float64, flattened.

    Strengths go into the ups.
    """
    parts: dict[str, list[Factors]] = {}
    for patch, strength in patches:
        for layer in patch.layers:
            up, down = (factor.flatten(1).double() for factor in patch.changes[layer.name])
            parts.setdefault(layer.name, []).append((strength * up, down))
    return {
        name: (torch.cat([up for up, _ in factors], 1), torch.cat([down for _, down in factors]))
        for name, factors in parts.items()
    }


def choose_ranks(
    values: Sequence[torch.Tensor], costs: Sequence[int], openings: Sequence[int], room: int
) -> list[int]:
    """The rank of each layer, so that the squared error is least for ``room`` bytes.

    Directions of all layers are taken by their squared singular value per byte; the first ones of
    a layer together, if only together they are worth its opening. No other choice of as many
    bytes has a smaller error. The room that is left goes to later directions that fit.

    Args:
        values: singular values of each layer, falling.
        costs: bytes of a direction of each. openings: bytes that each takes at any rank but 0.
    """
    blocks: list[tuple[float, int, int]] = []  # (squares per byte, layer, directions)
    for layer, (singular, cost, opening) in enumerate(zip(values, costs, openings)):
        if not len(singular):
            continue
        squares = singular.square()
        shares = squares.cumsum(0) / (opening + cost * torch.arange(1, len(singular) + 1))
        first = int(shares.argmax()) + 1
        blocks.append((float(shares[first - 1]), layer, first))
        blocks += [(float(square) / cost, layer, 1) for square in squares[first:]]
    ranks = [0] * len(values)
    closed: set[int] = set()
    for _, layer, count in sorted(blocks, key=lambda block: -block[0]):
        if layer in closed:
            continue
        opening = 0 if ranks[layer] else openings[layer]
        fitting = min(count, max(0, (room - opening) // costs[layer]))
        if fitting < count:
            closed.add(layer)  # its later directions would leave a gap
        if fitting:
            ranks[layer] += fitting
            room -= opening + fitting * costs[layer]
    return ranks


class MergedLayer(NamedTuple):
    """The merged change of a layer, up [out, k] @ down [k, in] in float64.

    Attributes:
        values: None, or singular values [k], falling, that belong between up and down.
        square: squared norm of the whole change.
    """

    layer: Layer
    up: torch.Tensor
    down: torch.Tensor
    values: torch.Tensor | None
    square: float

    @property
    def cost(self) -> int:
        """Bytes of a direction in a file."""
        return BYTES * (len(self.up) + self.down.shape[1])

    def of_rank(self, rank: int) -> tuple[Factors, float]:
        """Its best factors of that rank, float32 in the layer's shape, and the square lost."""
        up, down, lost = self.up, self.down, 0.0
        if self.values is not None:
            lost = max(0.0, self.square - float(self.values[:rank].square().sum()))
            up, down = up[:, :rank] * self.values[:rank], down[:rank]
        up, down, shape = up.float(), down.float(), self.layer.shape
        if len(shape) == 4:
            up, down = up[:, :, None, None], down.unflatten(1, shape[1:])
        return (up, down), lost


def build_merged(
    patches: Strengths, changes: Mapping[str, Factors], settings: dict[str, Any], budget: int = 0,
    losses: Sequence[float] = (),
) -> Merged:  # fmt: skip
    """The merged patch, cut to at most ``budget`` bytes of file if that is not 0.

    Args:
        patches: that were merged. changes: of ``concatenate``, or of ``joint.joint_change``.
        settings: for the record. losses: before and after minimising, for the record.

    Raises:
        ForgetError: nothing is left, or not even one direction fits into the budget.
    """
    family, info = _family(patches), _info(patches, settings, losses)
    known = layers_by_name(family)
    squares = {name: square_norm(*factors) for name, factors in changes.items()}
    whole = sum(squares.values())
    bound = sum(float(up.norm() * down.norm()) ** 2 for up, down in changes.values())
    if not whole > CANCELLED * bound:
        raise ForgetError("The patches cancel each other out: nothing would be left to save.")
    layers = []
    for name, (up, down) in changes.items():
        too_high = up.shape[1] > min(MAX_RANK, len(up), down.shape[1])
        values = None
        if budget or too_high:
            up, down, values = _decomposed(up, down)
        layers.append(MergedLayer(known[name], up, down, values, squares[name]))

    def patch_of(ranks: Iterable[int]) -> ForgetPatch:
        cut = [(layer, rank, *layer.of_rank(rank)) for layer, rank in zip(layers, ranks)]
        error = round((sum(lost for *_, lost in cut) / whole) ** 0.5, 6)
        kept = {layer.layer.name: factors for layer, rank, factors, _ in cut if rank}
        return ForgetPatch(family, kept, info | {"truncation_error": error})

    ranks = [min(MAX_RANK, layer.up.shape[1]) for layer in layers]
    patch = patch_of(_ranks_within(budget, layers, family, patch_of) if budget else ranks)
    notes = [*_notes(patches), *lost_elsewhere(family, patch.changes)]
    return Merged(patch, patch.info["truncation_error"], notes)


def _ranks_within(
    budget: int, layers: Sequence[MergedLayer], family: Family,
    patch_of: Callable[[Iterable[int]], ForgetPatch],
) -> list[int]:  # fmt: skip
    """The best ranks for a file of at most ``budget`` bytes."""
    values = [layer.values for layer in layers if layer.values is not None]  # all have them
    costs = [layer.cost for layer in layers]
    names = file_names(family, [layer.layer for layer in layers]).names
    openings = [_header_bytes(name, layer) for layer, name in names.items()]
    strongest = max(range(len(layers)), key=lambda i: float(values[i][:1].sum()))
    smallest = file_size(patch_of(int(i == strongest) for i in range(len(layers))))
    record = smallest - costs[strongest] - openings[strongest] + DIGITS
    room, over = budget - record, 0
    while True:
        room -= over
        ranks = choose_ranks(values, costs, openings, room)
        # What other programs need beside the changes depends on the ranks; see ``padding``.
        over = file_size(patch_of(ranks)) - budget if any(ranks) else 0
        if over <= 0:
            break
    if not any(ranks):
        least = record + min(map(sum, zip(costs, openings)))
        raise ForgetError(
            f"{budget / 1000:g} kB are too few: the record of what was merged and one direction of "
            f"one layer take {least / 1000:.1f} kB."
        )
    return ranks


def _decomposed(
    up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, vh and s of the singular value decomposition of up @ down, without zeros."""
    u, s, vh = product_svd(up, down)
    count = min(MAX_RANK, int((s > ZERO * s[:1]).sum()))
    return u[:, :count], vh[:count], s[:count]


def _header_bytes(name: str, layer: Layer) -> int:
    """Bytes of a layer in a file's header, at most, and of its alpha."""
    shape = [MAX_RANK, *layer.shape[1:], *layer.shape[:1]]
    entry = {"dtype": "F16", "shape": shape, "data_offsets": [10**10, 10**10]}
    text = json.dumps({f"{name}.{part}": entry for part in (*PARTS, ALPHA)}, separators=(",", ":"))
    return len(text) + BYTES


def _family(patches: Strengths) -> Family:
    """The family of the merged patch. One of an unknown model has the layers of all patches."""
    families = [patch.family for patch, _ in patches]
    family = families[0]
    if not isinstance(family, UnknownFamily):
        return family
    # Of a layer in several patches, the one whose path is known, which older files do not tell.
    layers = sorted((layer for patch, _ in patches for layer in patch.layers), key=_path_is_known)
    entries = [entry for one in families if (entry := getattr(one, "entry", None))]
    return replace(
        family,
        listed=tuple({layer.name: layer for layer in layers}.values()),  # type: ignore[arg-type]
        entry=entries[0] if entries else None,
    )


def _path_is_known(layer: Layer) -> bool:
    return layer.compvis != layer.name


def _info(patches: Strengths, settings: dict[str, Any], losses: Sequence[float]) -> Info:
    """The record of a merged patch; see ``metadata.new_info``."""
    infos = [patch.info for patch, _ in patches]
    concepts: dict[tuple[str, str], Info] = {}
    for info in infos:
        for concept in info.get("concepts", []):
            concepts.setdefault((concept["name"], concept["kind"]), concept)
    bases = {info.get("base.fingerprint") for info in infos}
    base = {key: value for key, value in infos[0].items() if key in BASE and len(bases) == 1}
    return base | {
        "concepts": list(concepts.values()),
        "method": "merge",
        "settings": settings,
        "base.prediction": infos[0].get("base.prediction", "epsilon"),
        "loss": loss_info(losses),
        **stamp(),
        "merged": [
            {
                "concepts": patch.concepts,
                "method": patch.info.get("method", "unknown"),
                "strength": strength,
            }
            for patch, strength in patches
        ],
    }


def _notes(patches: Strengths) -> list[str]:
    """Warnings: changed files, different bases, and concepts that several patches forget."""
    notes = [f"{_names(patch)}: {CHANGED}." for patch, _ in patches if patch.info.get("changed")]
    others = [other_base(patch.info, patches[0][0].info) for patch, _ in patches]
    if any(each and each != PRECISION for each in others):
        notes.append("The patches were made on different bases of this family: look at the result.")
    seen: set[tuple[str, str]] = set()
    repeated: dict[str, None] = {}
    for patch, _ in patches:
        concepts = {(record["name"], record["kind"]) for record in patch.info.get("concepts", [])}
        repeated |= dict.fromkeys(name for name, _ in sorted(concepts & seen))
        seen |= concepts
    if repeated:
        names = ", ".join(repeated)
        notes.append(f"Several of the patches forget {names:.200}: their changes add up.")
    return notes
