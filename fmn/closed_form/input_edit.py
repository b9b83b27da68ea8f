"""Closed forms that edit what cross-attention reads, as exact low ranks.

Every edit here has the form W' = W (I + A B) for all keys and values W at once: A [D, n], B [n, D],
with D the width of a text token. So a patch is up = W A, down = B, and one D x D system, solved in
float64, serves every layer. Published codes store full matrices instead.
"""

import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import gram, relative_error, to_float64, truncate_product
from ..models.families import Layer, UNetFamily, layers
from ..models.interface import UNet
from ..patches.file_check import MAX_RANK
from ..patches.patch import ForgetPatch
from ..patches.task import Task
from ..progress import StepProgress
from .text_embeddings import Pairs

NO_DIRECTION = 1e-12  # of the largest singular value
NONE_LEFT = 1e-9  # of a norm: float64's noise in what is left of a vector

Changes = dict[str, tuple[Tensor, Tensor]]  # layer name -> up [out, r], down [r, in]
RightOf = Callable[[Layer, Tensor], Tensor]  # a layer and its weight [out, D] -> right [n, D]


class InputEdit(NamedTuple):
    """W' = W (I + left right): left [D, n], right [n, D], float64."""

    left: Tensor
    right: Tensor

    def then(self, other: "InputEdit") -> "InputEdit":
        """W (I + self) (I + other): an edit made on the edited matrix."""
        left = torch.cat([self.left, other.left + self.left @ (self.right @ other.left)], 1)
        return InputEdit(left, torch.cat([self.right, other.right]))


def uce(
    targets: Tensor,
    anchors: Tensor,
    kept: Tensor,
    erase: float = 1.0,
    preserve: float = 1.0,
    damping: float = 0.5,
) -> InputEdit:
    """Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761, eq. 7).

    W' = [l W + e sum W c* c^T + p sum W k k^T] [l I + e sum c c^T + p sum k k^T]^-1. As W k is
    what W gives already, W' = W (I + e (C* - C) C^T M^-1) with M the bracket on the right.

    Args:
        targets, anchors: rows c and c*, [n, D].
        kept: rows k, [m, D].
        erase, preserve, damping: e, p and l.
    """
    # M = l I + e sum c c^T + p sum k k^T
    system = damping * torch.eye(targets.shape[1], dtype=targets.dtype)
    system += erase * gram(targets) + preserve * gram(kept)
    # left = e (C* - C), right = C^T M^-1
    return InputEdit(erase * (anchors - targets).mT, torch.linalg.solve(system, targets.mT).mT)


def debiased_anchors(contexts: Tensor, attributes: Tensor, weights: Sequence[float]) -> Tensor:
    """The anchors of UCE's debiasing, as in its released code: v* = W c + sum_a r_a W c_a.

    As W is linear, that is ``uce`` with c* = c + sum_a r_a c_a, for rows c [n, D] and c_a [a, D].
    """
    return contexts + torch.tensor(weights, dtype=contexts.dtype) @ attributes


def weight_of(denoiser: UNet, name: str) -> Tensor:
    """A layer's weight in float64."""
    return to_float64(denoiser.weight(name))


def weight_gram(denoiser: UNet, family: UNetFamily) -> Tensor:
    """Sum of W^T W over all keys and values, [D, D] in float64, on the CPU."""
    names = [layer.name for layer in key_value_layers(family)]
    return reduce(torch.add, (gram(weight_of(denoiser, name)) for name in names)).cpu()


def key_value_layers(family: UNetFamily, which: str = "kv") -> list[Layer]:
    """The cross-attention layers that read text: keys and values, or ``k`` or ``v`` alone."""
    ends = {"kv": (".to_k", ".to_v"), "k": (".to_k",), "v": (".to_v",)}[which]
    return [x for x in layers(family) if x.is_key_or_value and x.name.endswith(ends)]


def compact(edit: InputEdit) -> InputEdit:
    """The same edit with as few columns as it has directions: at least one, at most D."""
    left_basis, left_core = torch.linalg.qr(edit.left)
    right_basis, right_core = torch.linalg.qr(edit.right.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT)
    count = max(1, int((s > NO_DIRECTION * s[:1]).sum()))
    roots = s[:count].sqrt()
    return InputEdit(
        left_basis @ u[:, :count] * roots, roots[:, None] * vh[:count] @ right_basis.mT
    )


def remaining_losses(before: float, after: float) -> list[float]:
    """Losses to report while solving: 1, and the share of a sum of squares that remains."""
    return [1.0, after / before if before else 1.0]


class Distances:
    """Sums of squares of what keys and values W do to pairs of contexts c, c*, before and after.

    With W' = W (I + left right), all of W (c - c*) and W' c - W c* are combinations of the few
    columns of W left, and of W times the part of c - c* that is no combination of left. So they
    follow from the Gram matrix of these columns: no context goes through any W.

    Attributes:
        inputs: [D, k + r] in float64: left, and a basis of that rest; for most edits r is 0.
        rank: k.
    """

    def __init__(self, pairs: Pairs, left: Tensor):
        both = torch.cat(pairs, 1)
        if len(both) > both.shape[1]:  # at most 2 D rows, with the same sums of squares
            both = torch.linalg.qr(both).R
        targets, anchors = both.chunk(2, 1)
        difference = (targets - anchors).mT
        coordinates = torch.linalg.lstsq(left, difference).solution
        rest = difference - left @ coordinates
        some = rest.norm() > NONE_LEFT * difference.norm()
        basis = torch.linalg.qr(rest).Q if some else rest[:, :0]
        self.inputs, self.rank = torch.cat([left, basis], 1), left.shape[1]
        # c and c - c*, the latter in the coordinates of ``inputs``
        self.targets, self.difference = targets.mT, torch.cat([coordinates, basis.mT @ rest])
        self.before = gram(self.difference.mT)
        self.right: Tensor | None = None

    def change(
        self, weight: Tensor, right: Tensor, rank: int
    ) -> tuple[Tensor, Tensor, list[float]]:
        """A layer's change W left right, truncated to a rank.

        Args:
            weight: W [out, D] in float64. right: [k, D].

        Returns:
            up [out, r], down [r, D], and sums of squares: of W left right what is lost and all of
            it, of W c - W c*, and of W' c - W c*.
        """
        outputs = weight @ self.inputs.to(weight)
        up, down, lost = truncate_product(outputs[:, : self.rank], right.to(weight), rank)
        if right is not self.right:
            # Grams, in the coordinates of ``inputs``, of left right, c - c*, and
            # (I + left right) c - c*.
            whole, after = torch.zeros_like(self.before), self.difference.clone()
            whole[: self.rank, : self.rank] = gram(right.mT)
            after[: self.rank] += right @ self.targets
            self.right, self.squares = right, (whole, self.before, gram(after.mT))
        output_gram = gram(outputs)
        sums = [(output_gram * square.to(weight)).sum() for square in self.squares]
        if lost:  # then W' c - W c* follows from the truncated factors
            moved = outputs @ self.difference.to(weight) + up @ (down @ self.targets.to(weight))
            sums[2] = moved.square().sum()
        return up, down, [lost, *map(float, sums)]


def input_patch(task: Task, pairs: Pairs, edit_of: Callable[[UNet], InputEdit]) -> ForgetPatch:
    """A patch of one ``InputEdit`` for all layers; see ``layer_patch``."""

    def open_edits(denoiser: UNet) -> tuple[Tensor, RightOf]:
        edit = compact(edit_of(denoiser))
        return edit.left, lambda layer, weight: edit.right

    return layer_patch(task, pairs, open_edits)


def layer_patch(
    task: Task,
    pairs: Pairs,
    open_edits: Callable[[UNet], tuple[Tensor, RightOf]],
    which: str = "kv",
) -> ForgetPatch:
    """A patch whose layers have edits W (I + left right), each with its own ``right``.

    Each layer is truncated to the settings' ``rank`` on its own: no basis shared by layers is
    better.

    Args:
        pairs: the record's losses are the sums of |W c - W c*|^2 and of |W' c - W c*|^2 over them
            and the layers; steps report ``remaining_losses`` of the layers so far.
        open_edits: function from the denoiser to left [D, n] in float64, and to a function from a
            layer and its float64 weight to right [n, D].
        which: ``kv``, ``k`` or ``v``.
    """
    start, rank = time.monotonic(), min(task.settings.rank * len(task.concepts), MAX_RANK)
    chosen = key_value_layers(task.model.family, which)
    total, changes = len(chosen), {}
    sums = torch.zeros(4, dtype=torch.float64)
    with task.model.watch() as denoiser, torch.no_grad():
        left, right_of = open_edits(denoiser)
        distances = Distances(pairs, left)
        for done, layer in enumerate(chosen, 1):
            weight = weight_of(denoiser, layer.name)
            right = right_of(layer, weight)
            up, down, squares = distances.change(weight, right, rank or MAX_RANK)
            sums += torch.tensor(squares, dtype=torch.float64)
            changes[layer.name] = up.float().cpu(), down.float().cpu()
            seconds = (time.monotonic() - start) / done * (total - done)
            task.on_step(StepProgress(done, total, remaining_losses(*sums[2:].tolist()), seconds))
    lost, whole, *losses = sums.tolist()
    return task.patch(changes, losses, relative_error(lost, whole))
