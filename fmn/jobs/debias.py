"""UCE's debiasing in rounds (Gandikota et al. 2024, arXiv 2308.14761, released code).

It samples images of a concept, lets a judge count its attributes, and shifts the concept towards
what is missing, until "a doctor" is a woman as often as a man, whatever the model learned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..concepts.concept import Concept
from ..errors import ForgetError
from ..methods import forget, uce
from ..metrics.judge import Judge
from ..models.image_sampler import open_sampler
from ..models.interface import UNetModel
from ..models.sampling import Sampling
from ..patches.patch import ForgetPatch


@dataclass(frozen=True)
class Round:
    """What one round solved with, and what its images show."""

    weights: dict[str, float]  # attribute -> r_a of ``debiased_anchors``
    shares: dict[str, float]  # attribute -> share of the images in which the judge prefers it

    def error(self, desired: dict[str, float]) -> float:
        """The largest distance of a share from the desired one."""
        return max(abs(desired[name] - self.shares[name]) for name in desired)


def balance(
    model: UNetModel,
    concept: Concept,
    desired: dict[str, float],
    judge: Judge,
    domain: str,
    settings: uce.Settings = uce.Settings(),
    sampling: Sampling = Sampling(),
    pictures: int = 10,
    rounds: int = 30,
    tolerance: float = 0.05,
    seed: int = 0,
    on_round: Callable[[Round], None] = lambda finished: None,
) -> tuple[ForgetPatch | None, list[Round]]:
    """Make a patch with which a concept shows its attributes in the desired shares.

    Each round adds desired minus observed share to the weights, as in the released code, and
    solves from the unpatched model. That need not converge: the best round counts.

    Args:
        desired: attribute -> share, 1 in total; labels of the judge in that domain.
        pictures: images a round, of the concept's prompts in turn, always from the same seeds.
        on_round: called after each round; may raise to cancel.

    Returns:
        the patch, None if the unpatched model is best, and all rounds.

    Raises:
        ForgetError: shares that do not add up, or labels that the judge lacks.
    """
    _check(desired, judge, domain)
    texts = [prompt.words for prompt in concept.training_prompts()]
    prompts = [texts[i % len(texts)] for i in range(pictures)]
    weights = dict.fromkeys(desired, 0.0)
    patches: list[ForgetPatch | None] = [None]
    done: list[Round] = []
    while True:
        applied = [(patches[-1], 1.0)] if patches[-1] else []
        with open_sampler(model, sampling) as sampler, sampler.applying(applied):
            images = sampler.draw(prompts, range(seed, seed + pictures))
        done.append(Round(dict(weights), _shares(judge, domain, images, desired)))
        on_round(done[-1])
        if done[-1].error(desired) < tolerance or len(done) > rounds:
            break
        for name in weights:
            weights[name] += desired[name] - done[-1].shares[name]
        attributes = ", ".join(f"{name} {weight:.6f}" for name, weight in weights.items())
        patches.append(forget(model, [concept], replace(settings, attributes=attributes)))
    best = min(range(len(done)), key=lambda i: done[i].error(desired))
    return patches[best], done


def _check(desired: dict[str, float], judge: Judge, domain: str) -> None:
    lacking = [name for name in desired if name not in judge.labels.get(domain, ())]
    if lacking or not desired:
        raise ForgetError(
            f"The judge has no label {', '.join(map(repr, lacking)) or 'to count'} in '{domain}': "
            "name attributes that are among its labels."
        )
    if abs(sum(desired.values()) - 1) > 1e-6 or min(desired.values()) < 0:
        raise ForgetError(
            f"The desired shares add up to {sum(desired.values()):g}: make them 1, none below 0."
        )


def _shares(
    judge: Judge, domain: str, images: torch.Tensor, desired: dict[str, float]
) -> dict[str, float]:
    """How often each attribute is the likeliest of the desired ones; images [N, H, W, 3]."""
    columns = [judge.labels[domain].index(name) for name in desired]
    likeliest = judge.probabilities(images, domain)[:, columns].argmax(1).tolist()
    return {name: likeliest.count(i) / len(likeliest) for i, name in enumerate(desired)}
