"""SPEED (Li et al. 2025, arXiv 2503.07392): a closed form inside the null space of what is kept.

The published formula works on [D, D] matrices for each layer. With n targets its change has rank
n, and here all systems are of size n and of the number of kept words.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..closed_form.input_edit import RightOf, layer_patch
from ..closed_form.text_embeddings import Pairs, concept_pairs, kept_contexts
from ..errors import ForgetError
from ..linalg import (
    extend_basis,
    kmeans_centres,
    main_directions,
    orthogonal_part,
    strong_directions,
    weakest_direction,
)
from ..models.families import Layer
from ..models.interface import Denoiser, UNetModel
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from . import shared_settings as shared

TITLE = "SPEED"
REVISION = 1
ABOUT = (
    "SPEED (arXiv 2503.07392): a closed form that edits values of cross-attention where kept "
    "words have no part, for many concepts at once."
)
SMALLEST = 1e-9  # share of the targets' sum of squares that has to lie outside the kept span


@dataclass(frozen=True)
class Settings(Base, method="speed"):
    retain: float = setting(
        1.0,
        "Penalty on the size of the change (retain scale). Small: a stronger edit; 0.05 for "
        "ten or more concepts. Large: no edit.",
        limits=(1e-6, 1e6, 0.01),
    )
    threshold: float = setting(
        0.1,
        "Directions of the kept words with a smaller eigenvalue may be edited. 0: only "
        "directions the kept words do not use. Large: all directions, kept words too.",
        limits=(0.0, 1e6, 0.01),
    )
    filter: bool = advanced(
        True,
        "On: each layer protects only the kept words that the edit would change more than the "
        "average, which leaves room for the edit. Off: all of them in all layers, faster.",
    )
    copies: int = advanced(
        10,
        "Noisy copies of each protected word, in each layer's weakest direction. 0: none. Only "
        "with filter.",
        limits=(0, 100),
    )
    invariants: bool = advanced(
        True, "On: the start token and the empty prompt stay exactly as they are."
    )
    layers: str = setting(
        "v",
        "What is edited. v: values, as published. k: keys. kv: both.",
        choices=("v", "k", "kv"),
    )
    tokens: str = shared.tokens()
    keep_list: str = shared.keep_list()
    rank: int = shared.solved_rank()
    seed: int = shared.seed()


PRESETS = {"speed": Settings(), "speed-many": Settings(retain=0.05)}


class Problem(NamedTuple):
    """Rows of float64 [n, D]: c and c*, the kept ones, and those that stay exactly."""

    pairs: Pairs
    kept: Tensor
    exact: Tensor


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``."""
    model, settings = task.model, task.settings
    pairs = Pairs.cat(concept_pairs(model, task.concepts, settings.tokens))
    kept = kept_contexts(model, task.kept_words())
    exact = invariants(model)[: None if settings.invariants else 0]
    problem = Problem(pairs, kept, exact)
    generator = torch.Generator().manual_seed(settings.seed)
    left = (pairs.anchors - pairs.targets).mT  # C* - C

    def open_edits(denoiser: Denoiser) -> tuple[Tensor, RightOf]:
        span = main_directions(kept, model.family.context_dim)
        if not settings.filter:
            shared = right_factor(problem, kept, span, settings)
            return left, lambda layer, weight: shared

        def right_of(layer: Layer, weight: Tensor) -> Tensor:
            weakest = weakest_direction(weight).cpu()
            moved = (weight @ left.to(weight)).cpu()
            retained = retained_rows(problem, moved, weakest, settings.copies, generator)
            return right_factor(problem, retained, extend_basis(span, weakest), settings)

        return left, right_of

    return layer_patch(task, pairs, open_edits, settings.layers)


def right_factor(problem: Problem, retained: Tensor, span: Tensor, settings: Settings) -> Tensor:
    """F [n, D] of dW = W (C* - C) F.

    Published, with A and B the means of c* c^T and c c^T over n targets, P the projector on
    eigenvectors of the mean of k k^T below the threshold, M = (B P + r I)^-1 and K what stays:

        dW = W (A - B) P (I - M K (K^T P M K)^-1 K^T P) M

    As B = C C^T / n, P M = (P - P C (n r I + C^T P C)^-1 C^T P) / r, which needs no [D, D].

    Args:
        retained: rows k.
        span: orthonormal basis [D, q] of a space that holds them.

    Raises:
        ForgetError: nothing of the targets lies in the null space.
    """
    targets, exact, scale = problem.pairs.targets, problem.exact, settings.retain
    basis = strong_directions(retained, settings.threshold, span)
    outside = orthogonal_part(targets, basis)  # C^T P
    if outside.square().sum() < SMALLEST * targets.square().sum():
        raise ForgetError(
            "The kept words fill all the room that the concepts need: raise the threshold, or keep "
            "fewer words."
        )
    ridge = len(targets) * scale * torch.eye(len(targets), dtype=torch.float64)  # n r I
    solved = torch.linalg.solve(ridge + outside @ outside.mT, outside)  # C^T P M / n
    if not len(exact):
        return solved
    held = orthogonal_part(exact, basis)  # K^T P
    held = (held - held @ targets.mT @ solved) / scale  # K^T P M
    # Pseudo-inverse: directions that the kept words span already are no further constraint.
    inverse = torch.linalg.pinv(held @ exact.mT, hermitian=True, rtol=1e-10)  # (K^T P M K)^-1
    return solved - solved @ exact.mT @ inverse @ held


def retained_rows(
    problem: Problem, moved: Tensor, weakest: Tensor, copies: int, generator: torch.Generator
) -> Tensor:
    """SPEED's influence-based prior filtering and directed prior augmentation: rows [m, D].

    The kept rows that the plain edit W (A - B) (I + B)^-1 changes no less than their mean, and of
    noisy copies of these those that it changes no less than the copies' mean.

    Args:
        moved: W (C* - C), [out, n].
        weakest: ``weakest_direction`` of W.
    """
    targets = problem.pairs.targets
    ridge = len(targets) * torch.eye(len(targets), dtype=torch.float64)
    plain = torch.linalg.solve(ridge + targets @ targets.mT, targets)

    def influenced(rows: Tensor) -> Tensor:
        influence = (rows @ plain.mT @ moved.mT).square().sum(1)
        return rows[influence >= influence.mean()]

    if not len(problem.kept):
        return problem.kept
    retained = influenced(problem.kept)
    if not copies or not len(retained):
        return retained
    copied = retained.repeat_interleave(copies, 0)
    noise = torch.randn(copied.shape, dtype=torch.float64, generator=generator)
    noisy = copied + torch.outer(noise @ weakest, weakest)
    return torch.cat([retained, influenced(noisy)])


def invariants(model: UNetModel) -> Tensor:
    """Rows [4, D] that every prompt shares: BOS, and three k-means centres of the empty prompt's
    other states."""
    empty = kept_contexts(model, ("",), "all")
    return torch.cat([empty[:1], kmeans_centres(empty[1:], 3)])
