"""One change that does what several patches do, each on its own prompts.

It minimises, as the fusion in MACE does (Lu et al. 2024, arXiv 2403.06135),

    sum_i |(dW - D_i) X_i^T|^2 / n_i + p |dW K^T|^2 / m + l t |dW|^2,    D_i = up_i down_i,

so dW = (sum_i D_i G_i) (S + l t)^-1 with G_i = X_i^T X_i / n_i: of no higher rank than the sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..linalg import gram
from .patch import Factors


class LayerInputs(NamedTuple):
    """The inputs of a layer, for ``joint_change``.

    Attributes:
        rows: X_i [n_i, in] for the prompts of each patch.
        square: S = sum_i X_i^T X_i / n_i + p K^T K / m, [in, in] in float64.
        damped: S + l t, where t is S's mean eigenvalue.
    """

    rows: list[torch.Tensor]
    square: torch.Tensor
    damped: torch.Tensor


def layer_inputs(
    rows: list[torch.Tensor], kept: torch.Tensor, preserve: float, damping: float
) -> LayerInputs:
    """The ``LayerInputs`` of rows X_i and of rows K [m, in] for prompts to keep.

    Args:
        preserve: p. damping: l.
    """
    square = preserve * gram(kept.double()) / max(1, len(kept))
    for inputs in rows:
        square += gram(inputs.double()) / len(inputs)
    eye = torch.eye(len(square)).to(square)
    return LayerInputs(rows, square, square + damping * square.trace() / len(square) * eye)


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
    down = torch.linalg.solve(inputs.damped, product.mT).mT

    def loss(factor: torch.Tensor) -> float:
        # |dW|^2 in the metric of S, minus twice its product with sum_i D_i G_i, plus the rest
        inner = factor @ inputs.square @ factor.mT - 2 * product @ factor.mT
        return float(((up.mT @ up) * inner).sum()) + unchanged

    return (up, down), (loss(summed), loss(down), unchanged)
