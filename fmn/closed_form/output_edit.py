"""Closed forms that edit what a layer gives, as low ranks: W' = (I + A B) W.

A [out, n] and B [n, out] belong to one layer, so a patch is up = A, down = B W. ``input_edit`` has
the other side, edits of what a layer reads.
"""

import time

import torch
from torch import Tensor

from ..errors import ForgetError
from ..linalg import balanced_factors, product_svd
from ..patches.file_check import MAX_RANK
from ..progress import OnStep, StepProgress


def span(columns: Tensor, tolerance: float = 1e-6) -> Tensor:
    """An orthonormal basis [out, n] of the span of columns [out, k], n <= k.

    Columns are scaled to one length first. A plain QR would give k vectors also where columns are
    equal or zero, and fill up with directions that mean nothing.
    """
    norms = columns.norm(dim=0)
    used = norms > 0
    u, s, _ = torch.linalg.svd(columns[:, used] / norms[used], full_matrices=False)
    return u[:, s > tolerance * s.max()] if len(s) else u[:, :0]


def proper_span(columns: Tensor, layer: str) -> Tensor:
    """``span``, refused if it covers the layer's whole output."""
    basis = span(columns)
    if basis.shape[1] == len(basis):
        raise ForgetError(
            f"There are as many directions to forget as '{layer}' has outputs ({len(basis)}): "
            "forget fewer names at once."
        )
    return basis


def reflection(weight: Tensor, basis: Tensor, amount: float) -> tuple[Tensor, Tensor]:
    """Factors up, down of (I - amount B B^T) W - W; B orthonormal [out, n].

    1 projects: nothing is left along B. 2 reflects: what was along B turns its sign.
    """
    return -amount * basis, basis.mT @ weight


def truncate_to_tolerance(
    up: Tensor, down: Tensor, rank: int = 0, tolerance: float = 1e-9
) -> tuple[Tensor, Tensor, float]:
    """The best factors of up @ down with at most ``rank`` columns.

    Args:
        rank: 0 takes as few as leave a relative Frobenius error of ``tolerance``, and no more
            than a patch file may have.

    Returns:
        up [out, r], down [r, in], r >= 1, and the relative error.
    """
    if not up.shape[1]:
        return up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[1]), 0.0
    u, s, vh = product_svd(up, down)
    whole = s.square().sum()
    # The sums of squares that are lost if only the first 0, 1, ... directions stay.
    lost = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)])
    errors = (lost / whole.clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    count = int((errors > tolerance).sum())
    count = max(1, min(count, rank or MAX_RANK))
    return *balanced_factors(u, s, vh, count), float(errors[count])


class PartProgress:
    """Reports finished parts of a solution to ``on_step``, each with a value as its loss."""

    def __init__(self, on_step: OnStep, total: int):
        self.on_step, self.total = on_step, total
        self.values: list[float] = []
        self.start = time.monotonic()

    def __call__(self, value: float) -> None:
        self.values.append(value)
        done = len(self.values)
        left = (time.monotonic() - self.start) / done * (self.total - done)
        self.on_step(StepProgress(done, self.total, list(self.values), left))
