"""Kernel inception distance (Binkowski et al. 2018, arXiv 1801.01401) on any judge's features."""

import torch

from ..errors import ForgetError


def kid(first: torch.Tensor, second: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features.

    The kernel is (x.y / F + 1)^3 (section 4 there), the estimate the U-statistic of Gretton et al.
    2012 (JMLR 13, eq. 3): about 0, and at times below, for two samples of one distribution. Papers
    take Inception's features, so numbers on others compare with each other only.

    Args:
        first, second: [N, F] and [M, F], at least two rows each.

    Raises:
        ForgetError: fewer than two rows, different widths, or values that are not finite.
    """
    first, second = _checked(first), _checked(second)
    if first.shape[1] != second.shape[1]:
        raise ForgetError(
            f"The features are {first.shape[1]} and {second.shape[1]} wide: "
            "take both from the same judge."
        )
    between = _kernel(first, second).mean()
    return float(_mean_of_pairs(first) + _mean_of_pairs(second) - 2 * between)


def _checked(features: torch.Tensor) -> torch.Tensor:
    """As doubles: the parts nearly cancel."""
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        kind = list(getattr(features, "shape", ())) or type(features).__name__
        raise ForgetError(f"Features are {kind}: give a tensor [pictures, width].")
    if len(features) < 2 or features.shape[1] < 1:
        raise ForgetError(
            f"A distance of sets needs two pictures or more in each: one has {len(features)}."
        )
    if not features.isfinite().all():
        raise ForgetError("Features hold values that are not finite: check the pictures.")
    return features.detach().double().cpu()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # [N, M]
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: torch.Tensor) -> torch.Tensor:
    """Mean of the kernel over all pairs of different rows."""
    kernel = _kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))
