"""Closed forms that edit what cross-attention reads, as exact low ranks.

Every edit here has the form W' = W (I + A B) for all keys and values W at once: A [D, n], B [n, D],
with D the width of a text token. So a patch is up = W A, down = B, and one D x D system, solved in
float64, serves every layer. No published code keeps this form; they store full matrices.
"""

import time
from dataclasses import asdict
from typing import NamedTuple

import torch

from ..linalg import cut, exact, gram, share
from ..models.families import layers
from ..patches.metadata import new_info
from ..patches.patch import MAX_RANK, ForgetPatch
from ..settings import setting
from ..training.loop import Step

NO_DIRECTION = 1e-12  # of the largest singular value
NONE_LEFT = 1e-9  # of a norm: float64's noise in what is left of a vector


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


def debias(contexts, attributes, weights, kept, erase=1.0, preserve=1.0, damping=0.5):
    """UCE's debiasing, as in its released code: v* = W c + sum_a r_a W c_a in place of W c*.

    As W is linear, that is ``uce`` with the anchors c + sum_a r_a c_a.

    Args:
        contexts: rows c of [n, D]. attributes: rows c_a of [a, D]. weights: the a numbers r_a.

    Returns:
        the edit, and the contexts with these anchors.
    """
    anchors = contexts + torch.tensor(weights, dtype=contexts.dtype) @ attributes
    return uce(contexts, anchors, kept, erase, preserve, damping), (contexts, anchors)


def weight_of(borrowed, layer):
    """A layer's weight in float64."""
    return exact(borrowed.module(layer.name).weight.detach())


def weight_gram(borrowed, family):
    """Sum of W^T W over all keys and values, [D, D] in float64, on the CPU."""
    return sum(gram(weight_of(borrowed, layer)) for layer in key_value_layers(family)).cpu()


def key_value_layers(family, which="kv"):
    """The cross-attention layers that read text: keys and values, or ``k`` or ``v`` alone."""
    ends = {"kv": (".to_k", ".to_v"), "k": (".to_k",), "v": (".to_v",)}[which]
    return [x for x in layers(family) if x.is_key_or_value and x.name.endswith(ends)]


def compact(edit):
    """The same edit with as few columns as it has directions: at least one, at most D."""
    left_basis, left_core = torch.linalg.qr(edit.left)
    right_basis, right_core = torch.linalg.qr(edit.right.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT)
    count = max(1, int((s > NO_DIRECTION * s[:1]).sum()))
    roots = s[:count].sqrt()
    return InputEdit(
        left_basis @ u[:, :count] * roots, roots[:, None] * vh[:count] @ right_basis.mT
    )


def left_of(before, after):
    """Losses to tell while solving: 1, and how much of the first sum of squares is left."""
    return [1.0, after / before if before else 1.0]


class Distances:
    """Sums of squares of what keys and values W do to pairs of contexts c, c*, before and after.

    With W' = W (I + left right), all of W (c - c*) and W' c - W c* are combinations of the few
    columns of W left, and of W times what of c - c* is no combination of left. So they follow from
    the Gram matrix of these columns: no context goes through any W.

    Attributes:
        inputs: [D, k + r] in float64: left, and a basis of that rest; for most edits r is 0.
        rank: k.
    """

    def __init__(self, pairs, left):
        targets, anchors = _fewer(pairs)
        off = (targets - anchors).mT
        shares = torch.linalg.lstsq(left, off).solution
        rest = off - left @ shares
        some = rest.norm() > NONE_LEFT * off.norm()
        basis = torch.linalg.qr(rest).Q if some else rest[:, :0]
        self.inputs, self.rank = torch.cat([left, basis], 1), left.shape[1]
        self.targets, self.off = targets.mT, torch.cat([shares, basis.mT @ rest])
        self.before, self.right = gram(self.off.mT), None

    def change(self, weight, right, rank):
        """A layer's change, cut to a rank.

        Args:
            weight: W [out, D] in float64. right: [k, D].

        Returns:
            up [out, r], down [r, D]; sums of squares: of W left right what is lost and all of it,
            of W c - W c*, and of W' c - W c*.
        """
        read = weight @ self.inputs.to(weight)
        up, down, lost = cut(read[:, : self.rank], right.to(weight), rank)
        if right is not self.right:
            self._see(right)
        sums = [(gram(read) * each.to(weight)).sum() for each in self.squares]
        if lost:
            left = read @ self.off.to(weight) + up @ (down @ self.targets.to(weight))
            sums[2] = left.square().sum()
        return up, down, [lost, *map(float, sums)]

    def _see(self, right):
        """Of W left right, W c - W c* and W' c - W c*: the squares of shares of ``inputs``."""
        whole, after = torch.zeros_like(self.before), self.off.clone()
        whole[: self.rank, : self.rank] = gram(right.mT)
        after[: self.rank] += right @ self.targets
        self.right, self.squares = right, (whole, self.before, gram(after.mT))


def rank_setting(default=0):
    return setting(
        default,
        "Largest rank of a layer's change for each concept; the file grows with it. 0: all of it, "
        f"nothing is cut up to rank {MAX_RANK} in all.",
        low=0,
        high=MAX_RANK,
    )


def erase(default=1.0):
    return setting(
        default,
        "Weight of what is forgotten. 0: nothing happens. Higher: the concept goes more surely, "
        "and neighbours with it.",
        low=0.0,
        high=1000.0,
        step=0.01,
    )


def preserve(default=1.0):
    return setting(
        default,
        "Weight of what is kept. 0: no keep-list. Higher: what is listed changes less.",
        low=0.0,
        high=1000.0,
        step=0.01,
    )


def damping(default):
    return setting(
        default,
        "Weight of leaving everything as it is (lambda). Small: a stronger edit. Large: none.",
        low=1e-6,
        high=1e6,
        step=0.01,
    )


def input_patch(model, concepts, settings, pairs, edit_of, which="kv", on_step=None):
    """A patch of one ``InputEdit`` for all layers; see ``layer_patch``.

    Args:
        edit_of: function from the ``Borrowed`` to the edit.
    """

    def open_edits(borrowed):
        edit = compact(edit_of(borrowed))
        return edit.left, lambda layer, weight: edit.right

    return layer_patch(model, concepts, settings, pairs, open_edits, which, on_step)


def layer_patch(model, concepts, settings, pairs, open_edits, which="kv", on_step=None):
    """A patch whose layers have edits W (I + left right) with a ``right`` of their own.

    A layer is cut to ``settings.rank`` by itself: no basis shared by layers can be better.

    Args:
        settings: the method's, with ``rank`` of ``rank_setting``; also for the record.
        pairs: ``contexts.Pairs``; the record's losses are the sums of |W c - W c*|^2 and of
            |W' c - W c*|^2 over them and the layers.
        open_edits: function from the ``Borrowed`` to left [D, n] in float64, and a function from
            (``Layer``, its float64 weight) to right [n, D].
        which: ``kv``, ``k`` or ``v``.
        on_step: gets a ``train.Step`` after each layer; its losses are 1 and how much of the first
            sum is left so far.
    """
    base, start = model.fingerprint(), time.monotonic()
    chosen, rank = key_value_layers(model.family, which), settings.rank * len(concepts)
    changes, sums = {}, torch.zeros(4, dtype=torch.float64)
    with model.borrow() as borrowed, torch.no_grad():
        left, right_of = open_edits(borrowed)
        distances = Distances(pairs, left)
        for done, layer in enumerate(chosen, 1):
            weight = weight_of(borrowed, layer)
            right = right_of(layer, weight)
            up, down, found = distances.change(weight, right, min(rank or MAX_RANK, MAX_RANK))
            sums += torch.tensor(found, dtype=torch.float64)
            changes[layer.name] = up.float().cpu(), down.float().cpu()
            if on_step:
                seconds = (time.monotonic() - start) / done * (len(chosen) - done)
                on_step(Step(done, len(chosen), left_of(*sums[2:].tolist()), seconds))
    lost, whole, *losses = sums.tolist()
    return finished(model, base, concepts, settings, changes, losses, share(lost, whole))


def _fewer(pairs):
    """Pairs with the same sums of squares under any linear map, but at most 2 D of them."""
    both = torch.cat(pairs, 1)
    return (torch.linalg.qr(both).R if len(both) > both.shape[1] else both).chunk(2, 1)


def finished(model, base, concepts, settings, changes, losses, lost=0.0):
    """The patch with its record.

    Args:
        base: fingerprint. changes: layer name -> (up, down). lost: relative error of any cut.
    """
    told = settings.method, asdict(settings)
    info = new_info(model, base, *told, concepts, losses, lost)
    return ForgetPatch(model.family, changes, info)
