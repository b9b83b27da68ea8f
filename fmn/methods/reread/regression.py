"""The ridge regression of Re-read, for each cross-attention layer."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...closed_form.input_edit import Changes, weight_of
from ...linalg import gram, truncate_matrix, truncate_product
from ...patches.joint import joint_change, layer_inputs
from ..shared_settings import rank_in_all
from .attention_output import cross_attention_layers
from .regression_data import ConceptSentences, KeptSentences, QuerySampler, SentencePairs
from .residual import Residual
from .settings import Settings

OVERSHOOT_STEP = 0.2
JOINT_PRESERVE = 0.2  # of ``preserve``, where several concepts are put together


class Problem(NamedTuple):
    """What the change of a layer is solved from."""

    name: str  # of the layer
    weight: Tensor  # W [out, C], float64
    concepts: list[tuple[Tensor, Tensor]]  # rows (o, o*) of each concept, [n, C]
    kept: Tensor  # rows k, [m, C]


@torch.no_grad()
def closed_form(
    sampler: QuerySampler,
    pairs: Sequence[SentencePairs],
    kept: Sequence[str],
    overshoots: Sequence[float],
) -> tuple[Changes, float]:
    """Solve for all layers.

    Args:
        overshoots: of each concept; with ``stop_at`` the most of it.

    Returns:
        layer name -> (up, down) on the CPU, and the mean of ``remaining_share``.
    """
    layers: Iterable[Problem] = problems(sampler, pairs, kept)
    settings = sampler.settings
    if settings.stop_at:
        layers = list(layers)
        overshoots = smallest_overshoots(sampler, layers, pairs, overshoots)
    changes, shares = {}, []
    for problem in layers:
        up, down = solve(problem, settings, overshoots)
        changes[problem.name] = up.float().cpu(), down.float().cpu()
        shares.append(remaining_share(problem, up, down))
        sampler.progress(sum(shares) / len(shares))
    return changes, sum(shares) / len(shares)


def problems(
    sampler: QuerySampler, pairs: Sequence[SentencePairs], kept: Sequence[str]
) -> Iterator[Problem]:
    """Each cross-attention layer's ``Problem``, from queries of drawings of all the sentences."""
    model, denoiser = sampler.model, sampler.denoiser
    *drawn, drawn_kept = sampler.draw([*both_sides(pairs), kept])
    concepts = [
        ConceptSentences(model, some, with_concept, without)
        for some, with_concept, without in zip(pairs, drawn[::2], drawn[1::2])
    ]
    drawings = [drawn_kept, *(sentences.queries for sentences in concepts)]
    kept_sentences = KeptSentences(model.encode_all(kept), drawings, sampler.settings)
    for layer in cross_attention_layers(denoiser, model.family):
        name = f"{layer.name}.to_out.0"
        rows = [sentences.rows(layer) for sentences in concepts]
        yield Problem(name, weight_of(denoiser, name), rows, kept_sentences.rows(layer))


def both_sides(pairs: Sequence[SentencePairs]) -> list[list[str]]:
    """The sentences with each concept, and those without it, in turn."""
    return [[pair[side] for pair in some] for some in pairs for side in (0, 1)]


def smallest_overshoots(
    sampler: QuerySampler,
    problems: Sequence[Problem],
    pairs: Sequence[SentencePairs],
    limits: Sequence[float],
) -> list[float]:
    """For each concept the least overshoot, in steps up to its limit, that is enough.

    That is where at most ``settings.stop_at`` of it remains, or the last step took less than that;
    see ``Residual``. Each concept is judged with all the others at what they have reached.
    """
    settings = sampler.settings
    residuals = [Residual(sampler, some) for some in pairs]
    overshoots, unfinished = [0.0] * len(limits), list(range(len(limits)))
    shares = dict.fromkeys(unfinished, math.inf)
    while unfinished:
        changes = {problem.name: solve(problem, settings, overshoots) for problem in problems}
        before, shares = shares, {i: residuals[i](changes) for i in unfinished}
        unfinished = [
            i
            for i in unfinished
            if shares[i] > settings.stop_at
            and before[i] - shares[i] >= settings.stop_at
            and overshoots[i] < limits[i]
        ]
        for i in unfinished:
            overshoots[i] = min(overshoots[i] + OVERSHOOT_STEP, limits[i])
    return overshoots


def solve(
    problem: Problem, settings: Settings, overshoots: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The change of a layer: of one concept ``solve_alone``; of several, these changes together.

    All concepts in one regression would share its penalty and its rank. ``patches.joint`` makes
    each do on its own rows what it does alone, which keeps more.

    Returns:
        up [out, r], down [r, C]
    """
    kept = settings.preserve * gram(problem.kept) / max(1, len(problem.kept))  # p mean k k^T
    changes = [
        solve_alone(problem.weight, rows, kept, settings, overshoot)
        for rows, overshoot in zip(problem.concepts, overshoots)
    ]
    if len(changes) == 1:
        return changes[0]
    preserve = settings.preserve * JOINT_PRESERVE
    inputs = layer_inputs([concept for concept, _ in problem.concepts], problem.kept, preserve)
    factors, _ = joint_change(changes, inputs)
    up, down, _ = truncate_product(*factors, rank_in_all(settings.rank, len(changes)))
    return up, down


def solve_alone(
    weight: Tensor, rows: tuple[Tensor, Tensor], kept: Tensor, settings: Settings, overshoot: float
) -> tuple[Tensor, Tensor]:
    """The best change of rank r of a layer that maps W o to W o + (1 + b) (W o* - W o).

    With b the overshoot it minimises, over n pairs (o, o*) and m kept rows k,

        mean |dW o - (1 + b) W (o* - o)|^2 + p mean |dW k|^2 + l t |dW|^2

    with t the mean eigenvalue of the rest's S = mean o o^T + p mean k k^T. Without a bound on the
    rank that is dW = W Z S^-1, Z = (1 + b) mean (o* - o) o^T, as in UCE. The best of rank r is the
    r leading singular parts of dW L, S = L L^T, times L^-1 (reduced-rank regression, Izenman
    1975).

    Args:
        weight, rows: as in ``Problem``, of one concept.
        kept: p mean k k^T [C, C].
    """
    concept, other = rows
    system = kept + gram(concept) / len(concept)  # + mean o o^T
    target = (1 + overshoot) * (other - concept).mT @ concept / len(concept)  # Z^T
    mean = system.trace() / len(system)  # t
    system += settings.damping * mean * torch.eye(len(system)).to(system)  # S
    root = torch.linalg.cholesky(system)  # L
    # dW L = W Z L^-T
    change = torch.linalg.solve_triangular(root, target.mT @ weight.mT, upper=False).mT
    up, down, _ = truncate_matrix(change, rank_in_all(settings.rank, 1))
    return up, torch.linalg.solve_triangular(root, down, upper=False, left=False)


def remaining_share(problem: Problem, up: Tensor, down: Tensor) -> float:
    """Mean over concepts of |W' o - W o*|^2 / |W o - W o*|^2."""
    shares = []
    for concept, other in problem.concepts:
        before = (concept - other) @ problem.weight.mT
        after = before + concept @ down.mT @ up.mT
        shares.append(float(after.square().sum() / before.square().sum()))
    return sum(shares) / len(shares)
