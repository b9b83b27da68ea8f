"""Several patches as one: changes added up, solved for jointly, and cut to a size.

Patches add up as matrices: the merged change of a layer is sum_i s_i up_i @ down_i, which is the
ups and the downs side by side. (Adding ups and downs each would make up products of different
patches that nobody trained.)
"""

import json
from dataclasses import replace
from datetime import datetime, timezone
from typing import NamedTuple

import torch

from .. import __version__
from ..errors import ForgetError
from ..linalg import gram, product_svd
from .lora_keys import PARTS, file_name
from .patch import MAX_RANK, ForgetPatch, file_size, load_patch

BYTES = 2  # of a number in a file
ZERO = 1e-12  # of a layer's largest singular value
DIGITS = 64  # bytes by which the record may grow when its numbers change
CANCELLED = 1e-12  # of the squares of what was added up: float64's noise


class Merged(NamedTuple):
    """A merged patch, the relative error of cutting it, and what a user should know of it."""

    patch: ForgetPatch
    error: float
    notes: list

    def report(self):
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


def opened(entries):
    """Patches of (patch or path of its file, strength), without those of strength 0.

    Raises:
        ForgetError: a file is none, two are of different families or shapes, or nothing is left.
    """
    found = [
        (source if isinstance(source, ForgetPatch) else load_patch(source), float(strength))
        for source, strength in entries
        if strength
    ]
    if not found:
        raise ForgetError(
            "There is nothing to merge: connect or name patches, at strengths other than 0."
        )
    first = found[0][0]
    for patch, _ in found:
        if not first.family.is_same(patch.family):
            raise ForgetError(
                f"The patch for {', '.join(first.concepts):.80} is for {first.family.title}, the "
                f"one for {', '.join(patch.concepts):.80} for {patch.family.title}: merge patches "
                "of one family."
            )
    _check_shapes([patch for patch, _ in found])
    return found


def _check_shapes(patches):
    """Refuse patches of one class of model that give a layer different shapes: of other families
    than those we know, a file tells the layers."""
    seen = {}
    for patch in patches:
        for layer in patch.layers:
            first, shape = seen.setdefault(layer.name, (patch, layer.shape))
            if shape != layer.shape:
                raise ForgetError(
                    f"'{layer.name:.80}' is of shape {list(shape)} in the patch for "
                    f"{', '.join(first.concepts):.80} and {list(layer.shape)} in the one for "
                    f"{', '.join(patch.concepts):.80}: merge patches made for one model."
                )


def _family(patches):
    """The family of the merged patch, with the layers of them all."""
    family = patches[0].family
    if family.known:
        return family
    own = {layer.name: layer for patch in patches for layer in patch.layers}
    return replace(family, own=tuple(own.values()))


def concatenate(entries):
    """The sum of patches: layer name -> (up [out, k], down [k, in]) in float64, flattened.

    Args:
        entries: [(patch, strength)]; strengths go into the ups.
    """
    parts = {}
    for patch, strength in entries:
        for layer in patch.layers:
            up, down = (factor.flatten(1).double() for factor in patch.changes[layer.name])
            parts.setdefault(layer.name, []).append((strength * up, down))
    return {
        name: (torch.cat([up for up, _ in own], 1), torch.cat([down for _, down in own]))
        for name, own in parts.items()
    }


class System(NamedTuple):
    """What a layer reads, for ``joint``.

    Attributes:
        rows: X_i [n_i, in] of each patch.
        wanted: S = sum_i X_i^T X_i / n_i + p K^T K / m in float64. whole: S with damping.
    """

    rows: list
    wanted: torch.Tensor
    whole: torch.Tensor


def system_of(rows, kept, preserve, damping):
    """The ``System`` of rows X_i and kept rows K; damping is a share of S's mean eigenvalue."""
    wanted = preserve * gram(kept.double()) / max(1, len(kept))
    for each in rows:
        wanted += gram(each.double()) / len(each)
    eye = torch.eye(len(wanted)).to(wanted)
    return System(rows, wanted, wanted + damping * wanted.trace() / len(wanted) * eye)


def joint(parts, system):
    """The change that does on each patch's prompts what the patch does, and little on kept ones.

    It minimises, as the fusion in MACE does (Lu et al. 2024, arXiv 2403.06135),

        sum_i |(dW - D_i) X_i^T|^2 / n_i + p |dW K^T|^2 / m + l t |dW|^2,    D_i = up_i down_i,

    so dW = (sum_i D_i G_i) (S + l t)^-1 with G_i = X_i^T X_i / n_i: of no higher rank than the sum.

    Args:
        parts: (up_i, down_i) for each of ``system.rows``, strengths included; None: no change.

    Returns:
        (up, down), and sums of squares: what the first two terms are for the sum of the D_i, what
        for the solution, and what for no change at all.
    """
    used = [(*part, rows) for part, rows in zip(parts, system.rows) if part is not None]
    towards, whole = [], 0.0
    for own_up, own_down, rows in used:
        read = rows.double() @ own_down.mT
        towards.append(read.mT @ rows.double() / len(rows))
        whole += float((read @ own_up.mT).square().sum()) / len(rows)
    up, towards = torch.cat([own_up for own_up, _, _ in used], 1), torch.cat(towards)
    summed = torch.cat([own_down for _, own_down, _ in used])
    down = torch.linalg.solve(system.whole, towards.mT).mT

    def left(factor):
        # |dW|^2 in the metric of S, minus twice its product with sum_i D_i G_i, plus the rest
        inner = factor @ system.wanted @ factor.mT - 2 * towards @ factor.mT
        return float(((up.mT @ up) * inner).sum()) + whole

    return (up, down), (left(summed), left(down), whole)


def choose_ranks(values, costs, openings, room):
    """How many directions to keep of each layer, so that the squared error is least for the bytes.

    Directions of all layers go into one order, by squared singular value for its bytes; those of a
    layer that pay for opening it only together go together. Taken in that order, no other choice
    of as many bytes has a smaller error. What room is left is filled with later ones that fit.

    Args:
        values: singular values of each layer, falling.
        costs: bytes of a direction of each. openings: bytes of having the layer at all.
        room: bytes in all.

    Returns:
        list of ranks, 0 allowed
    """
    blocks = []
    for layer, (own, cost, opening) in enumerate(zip(values, costs, openings)):
        if not len(own):
            continue
        squares = own.square()
        shares = squares.cumsum(0) / (opening + cost * torch.arange(1, len(own) + 1))
        first = int(shares.argmax()) + 1
        blocks.append((float(shares[first - 1]), layer, first))
        blocks += [(float(square) / cost, layer, 1) for square in squares[first:]]
    ranks, closed = [0] * len(values), set()
    for _, layer, count in sorted(blocks, key=lambda block: -block[0]):
        if layer in closed:
            continue
        opening = 0 if ranks[layer] else openings[layer]
        fitting = min(count, max(0, (room - opening) // costs[layer]))
        if fitting < count:
            closed.add(layer)  # a layer's directions come in order: none behind this one
        if fitting:
            ranks[layer] += fitting
            room -= opening + fitting * costs[layer]
    return ranks


def finished(entries, changes, settings, budget=0, losses=()):
    """The merged patch, cut to at most ``budget`` bytes of file if that is not 0.

    Args:
        entries: [(patch, strength)] that were merged. changes: of ``concatenate`` or ``joint``.
        settings: for the record. losses: what was minimised, before and after.

    Raises:
        ForgetError: nothing is left, or not even one direction fits into the budget.
    """
    family = _family([patch for patch, _ in entries])
    info = _info(entries, settings, losses)
    known = {layer.name: layer for patch, _ in entries for layer in patch.layers}
    squares = {name: _square(*factors) for name, factors in changes.items()}
    bound = sum(float(up.norm() * down.norm()) ** 2 for up, down in changes.values())
    if not sum(squares.values()) > CANCELLED * bound:
        raise ForgetError("The patches cancel each other out: nothing would be left to save.")
    parts = {
        name: _spectrum(*factors) if budget or _too_high(*factors) else (*factors, None)
        for name, factors in changes.items()
    }

    def patch_of(ranks):
        kept, lost = {}, 0.0
        for (name, (up, down, values)), rank in zip(parts.items(), ranks):
            if values is not None:
                lost += max(0.0, squares[name] - float(values[:rank].square().sum()))
                up, down = up[:, :rank] * values[:rank], down[:rank]
            if rank:
                kept[name] = _shaped(up, down, known[name].shape)
        error = round((lost / sum(squares.values())) ** 0.5, 6)
        return ForgetPatch(family, kept, info | {"truncation_error": error})

    ranks = [min(MAX_RANK, up.shape[1]) for up, _, _ in parts.values()]
    if budget:
        spectra = [values for *_, values in parts.values()]
        costs = [BYTES * (len(up) + down.shape[1]) for up, down, _ in parts.values()]
        openings = [_entry_bytes(family, known[name]) for name in parts]
        strongest = max(range(len(ranks)), key=lambda i: float(spectra[i][:1].sum()))
        one = [int(i == strongest) for i in range(len(ranks))]
        record = file_size(patch_of(one)) - costs[strongest] - openings[strongest] + DIGITS
        ranks = choose_ranks(spectra, costs, openings, budget - record)
        if not any(ranks):
            least = record + min(map(sum, zip(costs, openings)))
            raise ForgetError(
                f"{budget / 1000:g} kB are too few: the record of what was merged and one "
                f"direction of one layer take {least / 1000:.1f} kB."
            )
    patch = patch_of(ranks)
    return Merged(patch, patch.info["truncation_error"], _notes(entries))


def _square(up, down):
    """|up @ down|^2 without the product."""
    return float(((up.mT @ up) * (down @ down.mT)).sum())


def _too_high(up, down):
    return up.shape[1] > min(MAX_RANK, len(up), down.shape[1])


def _spectrum(up, down):
    """The singular value decomposition of up @ down without what is zero: u, vh, s."""
    u, s, vh = product_svd(up, down)
    count = min(MAX_RANK, int((s > ZERO * s[:1]).sum()))
    return u[:, :count], vh[:count], s[:count]


def _entry_bytes(family, layer):
    """What a layer takes in a file's header, at most, and its alpha."""
    shape = [MAX_RANK, *layer.shape[1:], *layer.shape[:1]]
    entry = {"dtype": "F16", "shape": shape, "data_offsets": [10**10, 10**10]}
    name = file_name(family, layer)
    told = json.dumps({f"{name}.{part}": entry for part in PARTS}, separators=(",", ":"))
    return len(told) + BYTES


def _shaped(up, down, shape):
    """Factors in float32, in a layer's dimensions."""
    up, down = up.float(), down.float()
    return (up[:, :, None, None], down.unflatten(1, shape[1:])) if len(shape) == 4 else (up, down)


def _info(entries, settings, losses):
    """The record of a merged patch; see ``patch.new_info``."""
    infos = [patch.info for patch, _ in entries]
    concepts = {}
    for info in infos:
        for concept in info.get("concepts", []):
            concepts.setdefault((concept["name"], concept["kind"]), concept)
    bases = {info.get("base.fingerprint") for info in infos}
    base = {"base.fingerprint": bases.pop()} if len(bases) == 1 and None not in bases else {}
    loss = {"first": losses[0], "last": losses[-1], "steps": len(losses)} if losses else {}
    return base | {
        "concepts": list(concepts.values()),
        "method": "merge",
        "settings": settings,
        "base.prediction": infos[0].get("base.prediction", "epsilon"),
        "loss": loss,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "merged": [
            {
                "concepts": patch.concepts,
                "method": patch.info.get("method", "unknown"),
                "strength": strength,
            }
            for patch, strength in entries
        ],
    }


def _notes(entries):
    """What a user should know: different bases, and concepts that several patches forget."""
    bases = {patch.info.get("base.fingerprint") for patch, _ in entries}
    notes = []
    if len(bases) > 1:
        notes.append("The patches were made on different bases of this family: look at the result.")
    seen, twice = set(), {}
    for patch, _ in entries:
        own = {(concept["name"], concept["kind"]) for concept in patch.info.get("concepts", [])}
        twice |= dict.fromkeys(name for name, _ in sorted(own & seen))
        seen |= own
    if twice:
        notes.append(
            f"Several of the patches forget {', '.join(twice):.200}: their changes add up."
        )
    return notes


def merge(sources, budget=0):
    """Add patches up; a list of (patch or path of its file, strength). Returns a ``Merged``.

    Args:
        budget: bytes that the file may have; 0: as many as it takes.
    """
    entries = opened(sources)
    settings = {"how": "concatenate", "budget": budget}
    return finished(entries, concatenate(entries), settings, budget)
