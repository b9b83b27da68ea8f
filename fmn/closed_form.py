"""Closed forms that edit what cross-attention reads, as exact low ranks.

Every edit here has the form W' = W (I + A B) for all keys and values W at once: A [D, n], B [n, D],
with D the width of a text token. So a patch is up = W A, down = B, and one D x D system, solved in
float64, serves every layer. No published code keeps this form; they store full matrices.
"""

from dataclasses import asdict
from typing import NamedTuple

import torch

from .families import layers
from .patch import ForgetPatch, new_info


class InputEdit(NamedTuple):
    """W' = W (I + left @ right): left [D, n], right [n, D], float64."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def none(width):
        empty = torch.zeros(width, 0, dtype=torch.float64)
        return InputEdit(empty, empty.mT)

    def applied(self, contexts):
        """What W' sees as its input, (I + left right) c, for rows c of [n, D]."""
        return contexts + contexts @ self.right.mT @ self.left.mT

    def then(self, other):
        """W (I + self) (I + other): an edit made on the edited matrix."""
        left = torch.cat([self.left, other.left + self.left @ (self.right @ other.left)], 1)
        return InputEdit(left, torch.cat([self.right, other.right]))


def gram(rows):
    """Sum of c c^T over rows [n, D]."""
    return rows.mT @ rows


def uce(targets, anchors, kept, erase=1.0, preserve=1.0, damping=0.5):
    """Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761, eq. 7).

    W' = [l W + e sum W c* c^T + p sum W k k^T] [l I + e sum c c^T + p sum k k^T]^-1. As W k is
    what W gives already, the difference is W e (C* - C) C^T M^-1 with M the bracket on the right.

    Args:
        targets, anchors: rows c and c* of [n, D]. kept: rows k of [m, D].
        erase, preserve, damping: e, p and l.
    """
    width = targets.shape[1]
    system = damping * torch.eye(width, dtype=targets.dtype)
    system += erase * gram(targets) + preserve * gram(kept)
    return InputEdit(erase * (anchors - targets).mT, torch.linalg.solve(system, targets.mT).mT)


def weight_gram(borrowed, family):
    """Sum of W^T W over all keys and values, [D, D] in float64, on the CPU."""
    total = torch.zeros(family.context_dim, family.context_dim, dtype=torch.float64)
    for layer in key_value_layers(family):
        weight = borrowed.module(layer.name).weight.detach().to("cpu", torch.float64)
        total += weight.mT @ weight
    return total


def residual(weights, edit, targets, anchors):
    """sum over layers of |W' c - W c*|^2: what an edit leaves of a concept.

    Args:
        weights: ``weight_gram``.
    """
    rows = edit.applied(targets) - anchors
    return float(((rows @ weights) * rows).sum())


def key_value_layers(family, which="kv"):
    """The cross-attention layers that read text: keys and values, or ``k`` or ``v`` alone."""
    ends = {"kv": (".to_k", ".to_v"), "k": (".to_k",), "v": (".to_v",)}[which]
    return [x for x in layers(family) if x.is_key_or_value and x.name.endswith(ends)]


def compact(edit, rank=0, tolerance=1e-9):
    """The same edit with as few columns as it has directions, and at most ``rank`` if that is set.

    Returns:
        the edit, and the relative Frobenius error of left @ right that the cut makes.
    """
    left_basis, left_core = torch.linalg.qr(edit.left)
    right_basis, right_core = torch.linalg.qr(edit.right.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT)
    own = int((s > tolerance * s.max()).sum()) if len(s) and s.max() > 0 else 0
    count = max(1, min(own, rank or own))
    lost = float(s[count:].norm() / s.norm()) if count < own else 0.0
    roots = s[:count].sqrt()
    left = left_basis @ u[:, :count] * roots
    return InputEdit(left, roots[:, None] * vh[:count] @ right_basis.mT), lost


def input_patch(model, concepts, settings, edit_of, which="kv", rank=0):
    """A patch of an ``InputEdit``.

    Args:
        settings: the method's, for the record.
        edit_of: function from ``weight_gram`` to (edit, losses); the losses are what the method
            calls its objective, before and after.
        which: ``kv``, ``k`` or ``v``.
        rank: largest rank of a layer's change; 0 cuts nothing.
    """
    base = model.fingerprint()
    with model.borrow() as borrowed, torch.no_grad():
        edit, losses = edit_of(weight_gram(borrowed, model.family))
        edit, lost = compact(edit, rank)
        changes = {}
        for layer in key_value_layers(model.family, which):
            weight = borrowed.module(layer.name).weight.detach().to("cpu", torch.float64)
            changes[layer.name] = (weight @ edit.left).float(), edit.right.float()
    return finished(model, base, concepts, settings, changes, losses, lost)


def finished(model, base, concepts, settings, changes, losses, lost=0.0):
    """The patch with its record.

    Args:
        base: fingerprint. changes: layer name -> (up, down). lost: relative error of any cut.
    """
    method = type(settings).__module__.rpartition(".")[2]
    info = new_info(model, base, method, asdict(settings), concepts, losses, lost)
    return ForgetPatch(model.family, changes, info)
