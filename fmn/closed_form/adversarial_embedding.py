"""The adversarial embedding of RECE (Gong et al. 2024, arXiv 2407.12383), in closed form.

Keys and values of cross-attention are linear in the text. So the text that undoes a patch best, in
the least-squares sense over all these layers, needs no pictures and no training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ForgetError
from ..models.families import UNetFamily, layers
from ..models.interface import UNet
from ..patches.patch import ForgetPatch


@dataclass(frozen=True)
class Hardest:
    """What ``hardest`` found; see ``distance``."""

    contexts: Tensor  # c', float64, of the shape of c
    before: float  # how far the patch takes keys and values of c itself
    after: float  # how far those of c' are from what c gave unpatched; 0: the patch is undone


def hardest(
    denoiser: UNet,
    family: UNetFamily,
    patches: Sequence[tuple[ForgetPatch, float]],
    contexts: Tensor,
    r: float = 0.1,
) -> Hardest:
    """The text that through the patched layers comes nearest to what c gives unpatched.

    Args:
        denoiser: without the patches.
        patches: each with its strength.
        contexts: c, [..., D]; every token counts, BOS and padding too.
        r: see ``hardest_contexts``.

    Raises:
        ForgetError: the patches do not fit, or change no key or value of cross-attention.
    """
    names = {layer.name for layer in layers(family) if layer.is_key_or_value}
    if not any(names & set(patch.changes) for patch, strength in patches if strength):
        raise ForgetError(
            "The patch changes no keys or values of cross-attention, so there is no embedding to "
            "solve for: use a patch whose layers include them, and a strength that is not 0."
        )
    unpatched, patched, cross = grams(denoiser, family, patches)
    solved = hardest_contexts(patched, cross, contexts, r)
    before = distance(unpatched, patched, cross, contexts, contexts)
    return Hardest(solved, before, distance(unpatched, patched, cross, contexts, solved))


def hardest_contexts(patched: Tensor, cross: Tensor, contexts: Tensor, r: float) -> Tensor:
    """c' = (r I + sum_l W'_l^T W'_l)^-1 (sum_l W'_l^T W_l) c, in float64, of contexts c [..., D].

    It minimises sum_l ||W'_l c' - W_l c||^2 + r ||c'||^2, RECE's objective with its closed form:
    the larger r, the nearer c' is to zero. The sums are those of ``grams``.

    Raises:
        ForgetError: r is not above 0.
    """
    if not 0 < r < torch.inf:
        raise ForgetError(f"r is {r}: use a number above 0, such as 0.1.")
    system = patched + r * torch.eye(len(patched), dtype=patched.dtype)  # r I + sum W'^T W'
    rows = contexts.detach().cpu().double()
    factor = torch.linalg.cholesky(system)
    solved = torch.cholesky_solve(cross @ rows.flatten(0, -2).mT, factor)
    return solved.mT.reshape(rows.shape)


def grams(
    denoiser: UNet, family: UNetFamily, patches: Sequence[tuple[ForgetPatch, float]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of W_l^T W_l, W'_l^T W'_l and W'_l^T W_l over all keys and values of cross-attention.

    Args:
        denoiser: its weights are the W_l.
        patches: with their strengths, which make W'_l = W_l + strength * up @ down.

    Returns:
        unpatched, patched and cross, float64 [D, D] on the CPU.
    """
    for patch, _ in patches:
        patch.check_family(family)
        patch.check_shapes(lambda layer: denoiser.module(layer.name).weight)
    shape = family.context_dim, family.context_dim
    unpatched, mixed, square = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for layer in [layer for layer in layers(family) if layer.is_key_or_value]:
        # First to the CPU: not every device has float64.
        weight = denoiser.weight(layer.name).cpu().double()
        unpatched.addmm_(weight.mT, weight)
        factors = [
            (*patch.changes[layer.name], s) for patch, s in patches if layer.name in patch.changes
        ]
        if factors:
            up = torch.cat([strength * up.double() for up, _, strength in factors], 1)
            down = torch.cat([down.double() for _, down, _ in factors])
            # W' = W + up @ down, with the low rank multiplied first.
            mixed.addmm_(down.mT, up.mT @ weight)
            square.addmm_(down.mT, up.mT @ up @ down)
    cross = unpatched + mixed
    return unpatched, cross + mixed.mT + square, cross


def distance(
    unpatched: Tensor, patched: Tensor, cross: Tensor, contexts: Tensor, others: Tensor
) -> float:
    """sqrt(sum_l ||W'_l c' - W_l c||^2 / sum_l ||W_l c||^2), over all tokens [..., D] c and c'.

    From the sums of ``grams`` alone, so anything below 1e-7 is rounding.
    """
    c, changed = (rows.detach().cpu().double().flatten(0, -2) for rows in (contexts, others))
    total = (c @ unpatched * c).sum()
    squared = (changed @ patched * changed).sum() - 2 * (changed @ cross * c).sum() + total
    return float((squared.clamp(min=0) / total).sqrt())
