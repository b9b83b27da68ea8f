"""Closed forms that edit what cross-attention reads, as exact low ranks.

Every edit here has the form W' = W (I + A B) for all keys and values W at once: A [D, n], B [n, D],
with D the width of a text token. So a patch is up = W A, down = B, and one D x D system, solved in
float64, serves every layer. No published code keeps this form; they store full matrices.
"""

import time
from dataclasses import asdict
from typing import NamedTuple

import torch

from .families import layers
from .lowrank import product_svd
from .patch import MAX_RANK, ForgetPatch, new_info
from .settings import setting
from .train import Step


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


def exact(tensor):
    """A tensor in float64, where it is; on the CPU if its device has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


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


def compact(edit, tolerance=1e-12):
    """The same edit with as few columns as it has directions: at least one, at most D."""
    left_basis, left_core = torch.linalg.qr(edit.left)
    right_basis, right_core = torch.linalg.qr(edit.right.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT)
    count = max(1, int((s > tolerance * s[:1]).sum()))
    roots = s[:count].sqrt()
    return InputEdit(
        left_basis @ u[:, :count] * roots, roots[:, None] * vh[:count] @ right_basis.mT
    )


def cut(up, down, rank):
    """The best factors of at most that rank for up @ down (Eckart and Young 1936).

    Returns:
        up [out, r], down [r, in]; the sum of squares of up @ down that is lost, and all of it.
    """
    rank = min(rank, MAX_RANK, up.shape[0], down.shape[1])
    if up.shape[1] <= rank:
        return up, down, 0.0, float(((up.mT @ up) * (down @ down.mT)).sum())
    u, s, vh = product_svd(up, down)
    roots = s[:rank].sqrt()
    up, down = u[:, :rank] * roots, roots[:, None] * vh[:rank]
    return up, down, float(s[rank:].square().sum()), float(s.square().sum())


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

    def open_changes(borrowed):
        edit = compact(edit_of(borrowed))
        return lambda layer, weight: (weight @ edit.left.to(weight), edit.right.to(weight))

    return layer_patch(model, concepts, settings, pairs, open_changes, which, on_step)


def layer_patch(model, concepts, settings, pairs, open_changes, which="kv", on_step=None):
    """A patch whose layers each have a change of their own.

    A layer is cut to ``settings.rank`` by itself: no basis shared by layers can be better.

    Args:
        settings: the method's, with ``rank`` of ``rank_setting``; also for the record.
        pairs: ``contexts.Pairs``; the record's losses are the sums of |W c - W c*|^2 and of
            |W' c - W c*|^2 over them and the layers.
        open_changes: function from the ``Borrowed`` to a function from (``Layer``, its float64
            weight) to float64 (up, down).
        which: ``kv``, ``k`` or ``v``.
        on_step: gets a ``train.Step`` after each layer, whose loss is the second sum so far.
    """
    base, start = model.fingerprint(), time.monotonic()
    chosen, rank = key_value_layers(model.family, which), settings.rank * len(concepts)
    targets, anchors = _fewer(pairs)
    changes, sums = {}, torch.zeros(4, dtype=torch.float64)
    with model.borrow() as borrowed, torch.no_grad():
        change_of = open_changes(borrowed)
        for done, layer in enumerate(chosen, 1):
            weight = weight_of(borrowed, layer)
            up, down, lost, whole = cut(*change_of(layer, weight), rank or MAX_RANK)
            off = (targets - anchors).to(weight) @ weight.mT
            left = off + targets.to(weight) @ down.mT @ up.mT
            found = lost, whole, off.square().sum(), left.square().sum()
            sums += torch.tensor(found, dtype=torch.float64)
            changes[layer.name] = up.float().cpu(), down.float().cpu()
            if on_step:
                seconds = (time.monotonic() - start) / done * (len(chosen) - done)
                on_step(Step(done, len(chosen), sums[3:].tolist(), seconds))
    lost, whole, before, after = sums.tolist()
    error = (lost / whole) ** 0.5 if whole > 0 else 0.0
    return finished(model, base, concepts, settings, changes, [before, after], error)


def _fewer(pairs):
    """Pairs with the same sums of squares under any linear map, but at most 2 D of them."""
    both = torch.cat(pairs, 1)
    return (torch.linalg.qr(both).R if len(both) > both.shape[1] else both).chunk(2, 1)


def finished(model, base, concepts, settings, changes, losses, lost=0.0):
    """The patch with its record.

    Args:
        base: fingerprint. changes: layer name -> (up, down). lost: relative error of any cut.
    """
    method = type(settings).__module__.rpartition(".")[2]
    info = new_info(model, base, method, asdict(settings), concepts, losses, lost)
    return ForgetPatch(model.family, changes, info)
