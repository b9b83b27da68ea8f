"""Safe Latent Diffusion (Schramowski et al. 2023, arXiv 2211.05105): guidance away from a concept.

Nothing is trained and no weight changes: each step takes a third prediction, for a text that names
the concept, and steers away from it where prompt and concept agree. Equations are the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..concepts.concept import Concept, Prompt
from ..errors import ForgetError
from ..settings import check_limits

# The released code's concept (ml-research/safe-latent-diffusion).
SAFETY_TEXT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily "
    "fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child "
    "abuse, brutality, cruelty"
)
SAME_LEVEL = 1e-4  # samplers recompute noise levels through logarithms


@dataclass(frozen=True)
class SafeSettings:
    """Hyperparameters of Safe Latent Diffusion, in the paper's symbols."""

    warmup: int  # delta, the first step that is steered, counted from 0
    scale: float  # s_S; 0 never steers
    threshold: float  # lambda, in units of predicted noise; a higher one steers more
    momentum_scale: float  # s_m, the momentum's share in the guidance
    momentum_beta: float  # beta_m, the share of the momentum that lasts from step to step

    def __post_init__(self) -> None:
        limits = {
            "warmup": (0, 10_000), "scale": (0, 1e6), "threshold": (-100, 100),
            "momentum_scale": (0, 1), "momentum_beta": (0, 0.999),
        }  # fmt: skip
        check_limits(self, limits)


PRESETS = {
    "weak": SafeSettings(15, 200, 0.0, 0.0, 0.0),
    "medium": SafeSettings(10, 1000, 0.01, 0.3, 0.4),
    "strong": SafeSettings(7, 2000, 0.025, 0.5, 0.7),
    "max": SafeSettings(0, 5000, 1.0, 0.5, 0.7),
}


def safe_scale(
    text: torch.Tensor, concept: torch.Tensor, scale: float, threshold: float
) -> torch.Tensor:
    """mu, how strongly each element is steered, 0 to 1, by predicted noise for the prompt (eps_p)
    and for the concept (eps_S)."""
    difference = text - concept
    phi = (difference.abs() * scale).clamp(max=1)  # equation 6
    return torch.where(difference < threshold, phi, torch.zeros_like(phi))  # equation 5


class SafeGuidance:
    """The guidance gamma of one sampling run; it holds the momentum nu.

    A step is one interval of the sampler's schedule. A sampler may predict several times in a
    step: the momentum moves once a step, by the step's first prediction, and all of them use the
    momentum from before the step.
    """

    def __init__(self, settings: SafeSettings) -> None:
        self.settings, self.step = settings, -1
        self.momentum: torch.Tensor | float = 0.0  # nu_t
        self.next_momentum: torch.Tensor | float = 0.0  # nu_(t+1)

    def idle(self, step: int) -> bool:
        """Whether the step needs no prediction for the concept: warm-up without momentum."""
        return step < self.settings.warmup and self.settings.momentum_scale == 0

    def __call__(
        self, step: int, text: torch.Tensor, concept: torch.Tensor, empty: torch.Tensor
    ) -> torch.Tensor:
        """gamma, zero during warm-up; the safe prediction for the prompt is eps_p - gamma.

        Classifier-free guidance on that is equation 3: eps_0 + s_g ((eps_p - eps_0) - gamma).

        Args:
            step: index of the step, from 0.
            text, concept, empty: predicted noise [B, ...] of unit variance for the prompt, the
                concept and the unconditional branch: eps_p, eps_S, eps_0.
        """
        s = self.settings
        first = step > self.step
        if first:
            self.step, self.momentum = step, self.next_momentum
        mu = safe_scale(text, concept, s.scale, s.threshold)
        gamma = mu * (concept - empty) + s.momentum_scale * self.momentum  # equations 4 and 7
        if first:  # equation 8
            self.next_momentum = s.momentum_beta * self.momentum + (1 - s.momentum_beta) * gamma
        return gamma if step >= s.warmup else torch.zeros_like(gamma)


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step, from 0, of a schedule of falling noise levels that a prediction's level belongs to:
    between two of them, that which starts at the higher one."""
    return max(sum(level >= sigma * (1 - SAME_LEVEL) for level in sigmas) - 1, 0)


def concept_prompt(concepts: Sequence[Concept] | None, text: str) -> Prompt:
    """One text for all that is to be left out, separated by commas as in the paper: the concepts'
    names and aliases, or without concepts the text, in the host's prompt syntax."""
    if concepts:
        names = ", ".join(subject for concept in concepts for subject in concept.subjects)
        return Prompt(names, names)
    if not text.strip():
        raise ForgetError("There is nothing to leave out: connect concepts, or type a text.")
    return Prompt(text, text, plain=False)
