"""Edited weights against their base, as low ranks.

Erasers such as ESD, UCE and SPEED save the weights themselves. What they changed is the difference
from the base, rounded to the file's own precision first: against an unrounded base, rounding alone
would be a fifth of a small edit.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import ForgetError
from ..linalg import balanced_factors, product_svd
from ..models.families import Family, Layer, layers, layers_by_name, text_layers
from .file_check import MAX_RANK
from .foreign_file import ForeignFile
from .weight_names import TEXT_PREFIXES, UNET_PREFIXES, Place, find, places, take

# Before the path of a layer in the U-Net or first text encoder.
PREFIXES = tuple(filter(None, (*UNET_PREFIXES, *TEXT_PREFIXES["clip_l"], *TEXT_PREFIXES["clip_h"])))
NOT_CHANGED = 1e-7  # relative size of a difference that is rounding in float32
TOO_LARGE = 0.5  # relative size, over all layers, that no edit of the same base has
GAP = 3.0  # ratio of neighbouring singular values that counts as the end of an edit
ENERGY = 0.99  # share of the square of a change that is kept where there is no gap
GAP_ENERGY = 0.95  # share of the square before a gap, without which it ends no edit
RANK_WITHOUT_GAP = 64


class WeightFile:
    """The weights of one model's layers in a file, whatever its names begin with."""

    def __init__(self, file: ForeignFile):
        self.file, self._keys = file, set(file.tensors)

    def place_of(self, layer: Layer, part: str = "weight") -> Place | None:
        """Where a layer's weight or bias is, or None."""
        return find(self._keys, places(layer, part))

    def shape(self, layer: Layer) -> tuple[int, ...] | None:
        """Of a layer's weight, which is not read for it, or None."""
        place = self.place_of(layer)
        if place is None:
            return None
        shape = self.file.shape(place[0])
        return shape if place[1] is None else (*(rows // 3 for rows in shape[:1]), *shape[1:])

    def weight(self, layer: Layer) -> torch.Tensor | None:
        """A layer's weight in its shape, or None; Linear and 1x1 Conv2d stand for each other."""
        place = self.place_of(layer)
        if place is None:
            return None
        key, tensor = place[0], take(self.file.tensors, place)
        scale = key.removesuffix("weight") + "scale_weight"
        if not tensor.is_floating_point() or scale in self._keys:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ForgetError(
                f"'{self.file.name}' holds '{key:.80}' as {kind}: use a copy in 16 or 32 bits."
            )
        fits = tensor.dim() >= 2 and tensor.numel() == torch.Size(layer.shape).numel()
        if not fits or tensor.shape[0] != layer.shape[0]:
            raise ForgetError(
                f"'{self.file.name}' holds '{key:.80}' of shape {list(tensor.shape)}, and "
                f"{list(layer.shape)} was expected: check the family and the base."
            )
        return tensor.reshape(layer.shape)


@dataclass
class Difference:
    """What a file changes of its base.

    Attributes:
        changes: layer name -> (up [out, r], down [r, in]) in float32.
        lost: relative Frobenius error of the cut to low rank, over all layers.
        not_held: of the square of all differences, the share in tensors that a LoRA cannot hold:
            norms, biases, embeddings.
        unchanged: layers that are in the file and equal to the base.
        not_compared: tensors beside the layers that the base does not have by that name.
        coarse_base: the base has fewer bits than the file, so the rounding of the base is in it.
    """

    changes: dict[str, tuple[torch.Tensor, torch.Tensor]]
    lost: float
    not_held: float
    unchanged: int = 0
    ranks: list[int] = field(default_factory=list)
    coarse_base: bool = False
    not_compared: int = 0


def difference(
    edited: WeightFile,
    base: WeightFile,
    family: Family,
    rank: int = 0,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Difference:
    """The changes of every layer of a family that is in both files.

    Args:
        rank: of each layer's change; 0 cuts each at the gap of its spectrum, see ``spectral_rank``.
        on_layer: called after each layer with how many are done and how many there are; may raise.

    Raises:
        ForgetError: no layer of the family, none that differs, or differences too large for an
            edit of this base.
    """
    present = [layer for layer in layers_by_name(family).values() if edited.place_of(layer)]
    if not present:
        raise ForgetError(
            f"'{edited.file.name}' holds no weights of {family.title} under names of diffusers or "
            "CompVis: check --family."
        )
    result, squares = Difference({}, 0.0, 0.0), torch.zeros(3, dtype=torch.float64)
    for done, layer in enumerate(present, 1):
        before, after = base.weight(layer), edited.weight(layer)
        if before is None or after is None:
            raise ForgetError(
                f"The base '{base.file.name}' lacks '{layer.name}', which '{edited.file.name}' "
                "changes: give the whole model that the eraser began with."
            )
        result.coarse_base |= before.element_size() < after.element_size()
        before = before.to(after).float()  # as the eraser saved what it left alone
        change = (after.float() - before).flatten(1)
        if not torch.isfinite(change.norm()):
            raise ForgetError(
                f"'{edited.file.name}' or its base holds NaN or infinite values in '{layer.name}': "
                "do not use it."
            )
        squares += torch.stack([change.square().sum(), before.square().sum(), torch.zeros(())])
        if change.norm() <= NOT_CHANGED * before.norm():
            result.unchanged += 1
        else:
            up, down, lost = _cut(change, rank)
            squares[2] += lost
            result.changes[layer.name] = _shaped(layer, up, down)
            result.ranks.append(len(down))
        on_layer(done, len(present))
    total, whole, lost = squares.tolist()
    _check_size(edited, base, result, total, whole)
    result.lost = (lost / total) ** 0.5
    square, result.not_compared = _not_held(edited, base, family)
    result.not_held = square / (square + total)
    return result


def spectral_rank(values: torch.Tensor) -> int:
    """Where a change ends and rounding begins: the largest gap between singular values.

    A closed form of n concepts has n values and a flat tail of rounding, which a tolerance would
    take in or cut into at random. Where no gap is wider than ``GAP``, as after training, as many
    as hold 99 % of the square, at most 64. No end of an edit is a gap behind a first value that
    holds most, nor one before the last sixteenth of the values, as square matrices have.

    Args:
        values: singular values [n], largest first.
    """
    values = values[values > 0]
    if len(values) < 2:
        return len(values)
    ratios = values[:-1] / values[1:]
    index = int(ratios[: min(MAX_RANK, len(values) - len(values) // 16)].argmax())
    energy = values.square().cumsum(0) / values.square().sum()
    if ratios[index] >= GAP and energy[index] >= GAP_ENERGY:
        return index + 1
    return min(int((energy < ENERGY).sum()) + 1, RANK_WITHOUT_GAP)


def _cut(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up, down, sum of squares lost) of a change [out, in]."""
    wide = change.shape[0] <= change.shape[1]
    eye = torch.eye(min(change.shape))
    u, s, vh = product_svd(*((eye, change) if wide else (change, eye)))
    rank = min(rank or spectral_rank(s), len(s), MAX_RANK)
    lost = float(s[rank:].double().square().sum())
    return *balanced_factors(u, s, vh, rank), lost


def _shaped(
    layer: Layer, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(layer.shape) == 2:
        return up.contiguous(), down.contiguous()
    return up[:, :, None, None].contiguous(), down.unflatten(1, layer.shape[1:]).contiguous()


def _check_size(
    edited: WeightFile, base: WeightFile, found: Difference, total: float, whole: float
) -> None:
    if not found.changes:
        raise ForgetError(
            f"'{edited.file.name}' equals the base '{base.file.name}' in all {found.unchanged} "
            "layers: it is not edited, or it is its own base."
        )
    if total > TOO_LARGE**2 * whole:
        raise ForgetError(
            f"'{edited.file.name}' differs from '{base.file.name}' by {(total / whole) ** 0.5:.0%} "
            "of its weights, too much for an edit of it: give the base that it was made from."
        )


def _not_held(edited: WeightFile, base: WeightFile, family: Family) -> tuple[float, int]:
    """(square of all differences in norms, biases and embeddings, tensors not in the base)."""
    everything = (*layers(family), *text_layers(family))
    pairs = [(edited.place_of(one, "bias"), base.place_of(one, "bias")) for one in everything]
    known = {place[0] for one in everything if (place := edited.place_of(one))}
    known |= {place[0] for place, _ in pairs if place}
    by_name = {_bare(key): key for key in base.file.tensors}
    for key in edited.file.tensors:
        if key not in known:
            same = by_name.get(_bare(key))
            pairs.append(((key, None), None if same is None else (same, None)))
    square, missing = 0.0, 0
    for own, other in pairs:
        if own is None:
            continue
        if other is None:
            missing += 1
            continue
        after, before = take(edited.file.tensors, own), take(base.file.tensors, other)
        if after.shape == before.shape and after.is_floating_point():
            change = after.float() - before.to(after).float()
            square += float(change.nan_to_num(0, 0, 0).square().sum())
    return square, missing


def _bare(key: str) -> str:
    """A key without what stands before the path of a layer in the U-Net or first text encoder."""
    return key.removeprefix(next(filter(key.startswith, PREFIXES), ""))


def families_of_weights(file: WeightFile, families: Iterable[Family]) -> list[Family]:
    """The families that a file's weights fit: by keys and values of cross-attention, without them
    by whatever other layers it holds (ESD-u), then by layers of the text encoder."""
    for choose in (_readers, layers, text_layers):
        shapes = {
            family: [
                (layer.shape, held)
                for layer in choose(family)
                if (held := file.shape(layer)) is not None
            ]
            for family in families
        }
        for shape_of in (tuple, _matrix_shape):
            fits = [
                family
                for family, pairs in shapes.items()
                if pairs and all(shape_of(wanted) == shape_of(held) for wanted, held in pairs)
            ]
            if fits:
                return fits
    return []


def _readers(family: Family) -> Iterable[Layer]:
    return [layer for layer in layers(family) if layer.is_key_or_value]


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The same of a Linear and of a Conv2d of kernel 1."""
    return shape[0] if shape else 0, math.prod(shape[1:])
