"""Reduced-rank ridge regression against its definition."""

import pytest
import torch

from fmn.closed_form.reduced_rank import reduced_rank_ridge

PRESERVE, DAMPING = 10.0, 1e-3


def literal(concepts, kept, rank):
    """The best change of a rank by the whole solution and an SVD in the metric of the inputs."""
    system = sum(o.T @ o / len(o) for o, _ in concepts) + PRESERVE * kept.T @ kept / len(kept)
    system += DAMPING * system.trace() / len(system) * torch.eye(len(system)).double()
    whole = sum(t.T @ o / len(o) for o, t in concepts) @ torch.linalg.inv(system)
    root = torch.linalg.cholesky(system)
    u, s, vh = torch.linalg.svd(whole @ root, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize(
    ("rows", "width", "out", "kept"),
    [(12, 7, 5, 9), (6, 40, 30, 8), (6, 40, 4, 8), (20, 30, 9, 40)],
    ids=["few inputs", "few rows", "few rows and outputs", "many kept rows"],
)
@pytest.mark.parametrize("rank", [1, 3, 100])
def test_both_forms_solve_the_regression(rows, width, out, kept, rank):
    torch.manual_seed(0)
    concepts = [
        (torch.randn(rows, width).double(), torch.randn(rows, out).double()) for _ in range(2)
    ]
    others = torch.randn(kept, width).double()
    up, down = reduced_rank_ridge(concepts, others, PRESERVE, DAMPING, rank)
    assert up.shape[1] == len(down) == min(rank, out, 2 * rows)
    torch.testing.assert_close(up.T @ up, torch.eye(up.shape[1]).double())
    torch.testing.assert_close(up @ down, literal(concepts, others, rank), rtol=1e-9, atol=1e-12)


def test_nothing_is_kept_without_kept_rows():
    """One row, no damping to speak of: the change gives the whole t."""
    o, t = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[1.0, 2.0, 2.0]]).double()
    up, down = reduced_rank_ridge([(o, t)], o[:0], PRESERVE, 1e-12, 1)
    torch.testing.assert_close(o @ (up @ down).T, t)
