"""One change that does what several patches do, each on its own prompts.

Close to the fusion in MACE (Lu et al. 2024, arXiv 2403.06135) it minimises

    sum_i |(dW - D_i) X_i^T|^2 / n_i + p |dW K^T|^2 / m + l t |dW - sum_i D_i|^2,
    D_i = up_i down_i.

So dW = sum_i D_i (G_i + l t) (S + l t)^-1 with G_i = X_i^T X_i / n_i, of no higher rank than the
sum. There the penalty pulls to 0. Here it pulls to the sum, as the patches are shrunk already.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..linalg import gram
from .patch import Factors

DAMPING = 0.01  # l; as ``settings.PRESERVE`` chosen on other targets than docs/batch.md reports


class LayerInputs(NamedTuple):
    """The inputs of a layer, for ``joint_change``.

    Attributes:
        rows: X_i [n_i, in] for the prompts of each patch.
        square: S = sum_i X_i^T X_i / n_i + p K^T K / m, [in, in] in float64.
        penalty: l t, where t is S's mean eigenvalue.
    """

    rows: list[torch.Tensor]
    square: torch.Tensor
    penalty: float


def layer_inputs(
    rows: list[torch.Tensor], kept: torch.Tensor, preserve: float, damping: float = DAMPING
) -> LayerInputs:
    """The ``LayerInputs`` of rows X_i and of rows K [m, in] for prompts to keep.

    Args:
        preserve: p. damping: l.
    """
    square = preserve * gram(kept.double()) / max(1, len(kept))
    for inputs in rows:
        square += gram(inputs.double()) / len(inputs)
    return LayerInputs(rows, square, damping * float(square.trace()) / len(square))


def joint_change(
    parts: Sequence[Factors | None], inputs: LayerInputs
) -> tuple[Factors, tuple[float, float, float]]:
    """The change that does on each patch's prompts what the patch does, and little on kept ones.

    Args:
        parts: (up_i, down_i) for each of ``inputs.rows``, strengths included; None: no change.

    Returns:
        (up, down) of dW, and the first two terms for the sum of the D_i, for the solution, and for
        no change at all.
    """
    changing = [(*part, rows) for part, rows in zip(parts, inputs.rows) if part is not None]
    products, unchanged = [], 0.0  # down_i G_i, and sum_i |D_i X_i^T|^2 / n_i
    for up_i, down_i, rows in changing:
        reduced = rows.double() @ down_i.mT  # [n_i, r]
        products.append(reduced.mT @ rows.double() / len(rows))
        unchanged += float((reduced @ up_i.mT).square().sum()) / len(rows)
    up, product = torch.cat([up_i for up_i, _, _ in changing], 1), torch.cat(products)
    summed = torch.cat([down_i for _, down_i, _ in changing])
    damped = inputs.square + inputs.penalty * torch.eye(len(inputs.square)).to(inputs.square)
    down = torch.linalg.solve(damped, (product + inputs.penalty * summed).mT).mT

    def loss(factor: torch.Tensor) -> float:
        # |dW|^2 in the metric of S, minus twice its product with sum_i D_i G_i, plus the rest
        inner = factor @ inputs.square @ factor.mT - 2 * product @ factor.mT
        return float(((up.mT @ up) * inner).sum()) + unchanged

    return (up, down), (loss(summed), loss(down), unchanged)
