import itertools

import pytest
import torch

from fmn.errors import ForgetError
from fmn.metrics.kid import kid


def literal(xs, ys):
    """The estimate as its definition has it, pair by pair."""

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y)) / len(x) + 1) ** 3

    def inner(rows):
        pairs = list(itertools.permutations(rows, 2))
        return sum(kernel(x, y) for x, y in pairs) / len(pairs)

    between = [kernel(x, y) for x in xs for y in ys]
    return inner(xs) + inner(ys) - 2 * sum(between) / len(between)


def test_by_hand():
    # F = 1; k(1, 3) = 64, k(0, 2) = 1, and between: k(1, 0) = 1, k(1, 2) = 27, k(3, 0) = 1,
    # k(3, 2) = 343, so 64 + 1 - 2 * 372 / 4 = -121.
    assert kid(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])) == -121.0


def test_is_the_definition():
    random = torch.Generator().manual_seed(0)
    first = torch.randn(5, 3, generator=random, dtype=torch.float64)
    second = torch.randn(7, 3, generator=random, dtype=torch.float64) + 1
    expected = literal(first.tolist(), second.tolist())
    assert kid(first, second) == pytest.approx(expected, rel=1e-12)
    assert kid(second, first) == pytest.approx(expected, rel=1e-12)


def test_is_unbiased():
    """Over many samples of one distribution the mean is 0; with the diagonal it would be 2.4."""
    random = torch.Generator().manual_seed(0)
    found = [kid(*torch.randn(2, 8, 4, generator=random)) for _ in range(2000)]
    assert abs(sum(found) / len(found)) < 0.05


def test_grows_with_the_distance():
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 50, 4, generator=random)
    near, far = kid(first, second + 0.5), kid(first, second + 1)
    assert 0 < near < far


@pytest.mark.parametrize(
    "first, second, says",
    [
        (torch.zeros(1, 3), torch.zeros(2, 3), "needs two pictures or more in each: one has 1"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "one has 0"),
        (torch.zeros(2, 3), torch.zeros(2, 4), "3 and 4 wide"),
        (torch.zeros(3), torch.zeros(2, 3), r"Features are \[3\]"),
        ([[1.0], [2.0]], torch.zeros(2, 1), "Features are list"),
        (torch.tensor([[1.0], [torch.nan]]), torch.zeros(2, 1), "not finite"),
        (torch.tensor([[1.0], [torch.inf]]), torch.zeros(2, 1), "not finite"),
    ],
)
def test_bad_features(first, second, says):
    with pytest.raises(ForgetError, match=says):
        kid(first, second)
