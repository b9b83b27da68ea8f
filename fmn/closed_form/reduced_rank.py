"""Reduced-rank ridge regression (Izenman 1975) on recorded rows, in its primal and dual form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import gram

NO_DIRECTION = 1e-12  # of the largest eigenvalue


def reduced_rank_ridge(
    concepts: Sequence[tuple[Tensor, Tensor]],
    kept: Tensor,
    preserve: float,
    damping: float,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The change D of rank r that adds t to a layer's output at inputs o, and little elsewhere.

    It minimises, over concepts of n pairs (o, t) each and m kept rows k,

        sum_concepts mean |D o - t|^2 + p mean |D k|^2 + l s |D|^2

    with p ``preserve``, l ``damping`` and s the mean eigenvalue of S = A^T A, whose rows A are o
    / sqrt(n) and k sqrt(p / m). Without a bound on the rank D = E^T A (A^T A + l s)^-1 = E^T (A A^T
    + l s)^-1 A, where E holds t / sqrt(n) and zeros for kept rows. The best of rank r projects it
    on the r main directions of what it gives, D S D^T. Fewer rows than inputs: the second form.

    Args:
        concepts: (o [n, in], t [n, out]) in float64. kept: [m, in].

    Returns:
        up [out, r], orthonormal, and down [r, in].
    """
    rows = torch.cat([o / len(o) ** 0.5 for o, _ in concepts])  # A without its kept rows
    wanted = torch.cat([t / len(t) ** 0.5 for _, t in concepts])  # E
    kept = kept * (preserve / max(1, len(kept))) ** 0.5
    penalty = damping * (rows.square().sum() + kept.square().sum()) / rows.shape[1]  # l s
    if len(rows) + len(kept) < rows.shape[1]:
        every = torch.cat([rows, kept])
        system = gram(every.mT)  # A A^T
        system.diagonal().add_(penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))[: len(rows)]
        # D S D^T = E^T R E with R = I - l s (A A^T + l s)^-1, rows and columns of concepts
        inner = torch.eye(len(rows)).to(rows) - penalty * inverse[:, : len(rows)]
        up = _main_outputs(wanted, inner, rank)
        return up, (wanted @ up).mT @ inverse @ every
    system = gram(rows) + gram(kept)
    system.diagonal().add_(penalty)
    root = torch.linalg.cholesky(system)
    crossed = torch.cholesky_solve(rows.mT, root)  # (A^T A + l s)^-1 A^T, columns of concepts
    up = _main_outputs(wanted, rows @ crossed, rank)
    return up, (crossed @ (wanted @ up)).mT


def _main_outputs(wanted: Tensor, inner: Tensor, rank: int) -> Tensor:
    """The main eigenvectors [out, r] of E^T R E, by the smaller of two matrices; r >= 1."""
    if len(wanted) > wanted.shape[1]:
        values, vectors = torch.linalg.eigh(wanted.mT @ inner @ wanted)
    else:
        root = _square_root(inner)
        values, left = torch.linalg.eigh(root @ gram(wanted.mT) @ root)
        vectors = wanted.mT @ root @ left / values.clamp(min=1e-300).sqrt()
    count = max(1, min(rank, int((values > NO_DIRECTION * values[-1]).sum())))
    return vectors[:, -count:].flip(1)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT
