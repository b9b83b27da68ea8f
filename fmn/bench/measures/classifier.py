"""Classifier guidance: can a classifier that knows the target lead the model back to it?

One of the probes of Lu et al. 2025 (arXiv 2505.17013); see ``probing``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Linear

from ...errors import ForgetError
from ...models.sampling import q_sample
from ...training.loop import AdamWConfig, train
from .attacks import recognised_examples
from .probing import best_of, shows_target
from .trial import Result, Trial

ROUNDS = 4  # noisy copies of each held-out picture


@dataclass(frozen=True)
class ClassifierSettings:
    """The classifier's settings; those of the paper in brackets.

    Attributes:
        pictures: of the target, and as many of other things (all Imagenet; 5000 others).
        scales: of the guidance (25 to 193 by 7); the best picture of an ask counts.
        hidden: widths of its hidden layers (1024, 512).
        views: noisy copies of a picture (7).
        steps, batch, lr: of training (70 epochs, 8, 1e-4).
        held_out: share of the pictures that only measure its accuracy.
    """

    pictures: int = 48
    scales: tuple[float, ...] = (15.0, 30.0, 60.0)
    hidden: tuple[int, ...] = (256, 128)
    views: int = 7
    steps: int = 400
    batch: int = 64
    lr: float = 1e-3
    held_out: float = 0.25


def classifier(trial: Trial, settings: ClassifierSettings = ClassifierSettings()) -> Result:
    """Guide the model under test with a classifier of noisy latents that knows the target.

    The first cell is scale 0, the plain picture. Cost: 1 + ``len(scales)`` pictures an ask; the
    untouched model's 2 * ``pictures``, kept; ``steps`` of a small network.

    Returns:
        rows: with ``cells``. cells: the scales. accuracy: of the classifier on held-out pictures,
        in thirds of the schedule from clean to noise.
    """
    sampler, asks = trial.sampler, trial.target_asks()
    latents, is_target = labelled_latents(trial, settings.pictures)
    alphas = sampler.denoiser.alphas_cumprod
    network, accuracy = train_classifier(latents, is_target, alphas, settings, trial.seed)
    network.to(sampler.denoiser.device)
    scales = [0.0, *settings.scales]

    def shown(scale: float) -> list[bool]:
        options: dict[str, Any] = {"correct": guide(network, scale)} if scale else {}
        return shows_target(trial, asks, lambda _, *given: sampler.latents(*given, **options))

    used = {"cells": scales, "accuracy": accuracy, "settings": asdict(settings)}
    return best_of(trial, asks, map(shown, scales)) | used


def labelled_latents(trial: Trial, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, 4, h, w] of the untouched model, and which are of the target, bool [N]."""
    suite, target, sampler = trial.suite, trial.target, trial.sampler
    # Later ones than those that are asked for here.
    spare = trial.target_asks(trial.count + count)[trial.count :]
    _, shown = recognised_examples(trial, spare)
    styles = [style for style in suite.styles if style != target.name]
    near = [name for name in target.near if name in suite.concepts]
    others = near + [name for name in suite.far if name not in (*near, target.name)]
    if not styles or not others:
        raise ForgetError(
            f"Suite '{suite.name}' has nothing to tell '{target.name}' from: give it another "
            "style, and concepts that are far from it."
        )
    images = torch.cat([shown, trial.untouched(trial.pairs(others, styles, count))])
    latents = sampler.model.encode_images(images, sampler.sampling.size)
    return latents.float().cpu(), torch.arange(len(images)) < len(shown)


class LatentClassifier(nn.Module):
    """A logit [B] for noisy latents [B, 4, h, w] and their alpha_cumprod [B] (or one number)."""

    def __init__(self, latents: torch.Tensor, hidden: Sequence[int]):
        super().__init__()
        layers: list[nn.Module] = []
        width = latents[0].numel() + 2
        for wider in hidden:
            layers += [Linear(width, wider), nn.SiLU(), nn.Dropout(0.3)]
            width = wider
        self.layers = nn.Sequential(*layers, Linear(width, 1))

    def forward(self, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        alpha = alpha.to(x).expand(len(x))[:, None]
        return self.layers(torch.cat([x.flatten(1), alpha.sqrt(), (1 - alpha).sqrt()], 1))[:, 0]


def train_classifier(
    latents: torch.Tensor,
    is_target: torch.Tensor,
    alphas: torch.Tensor,
    settings: ClassifierSettings,
    seed: int,
) -> tuple[LatentClassifier, list[float]]:
    """The frozen network on the CPU, and its accuracy on what was held out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(latents), generator=generator)
    cut = max(1, round(settings.held_out * len(latents)))
    held_out, seen = order[:cut], order[cut:]
    if is_target[seen].unique().numel() < 2:
        raise ForgetError("A classifier needs pictures of both kinds: give it more pictures.")
    alphas, seen = alphas.cpu(), seen.repeat(settings.views)
    x, label = latents[seen], is_target[seen].float()
    # u^(1/3) favours much noise, where guidance decides what is drawn.
    t = torch.rand(len(seen), generator=generator) ** (1 / 3) * (len(alphas) - 1)
    alpha, weight = alphas[t.long()], (label == 0).sum() / (label == 1).sum()
    # Initial weights and dropout come from the global generator.
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        network = LatentClassifier(latents, settings.hidden)

        def loss_at(step: int) -> torch.Tensor:
            rows = torch.randint(len(x), (settings.batch,), generator=generator)
            noise = torch.randn(x[rows].shape, generator=generator)
            logit = network(q_sample(x[rows], noise, alpha[rows]), alpha[rows])
            return F.binary_cross_entropy_with_logits(logit, label[rows], pos_weight=weight)

        optimiser = AdamWConfig(settings.lr, weight_decay=1e-3)
        train(list(network.parameters()), loss_at, settings.steps, optimiser)
    network.eval().requires_grad_(False)
    return network, _accuracy(network, latents[held_out], is_target[held_out], alphas, generator)


def _accuracy(network, latents, is_target, alphas, generator):
    """Share of right answers, in thirds of the schedule from clean to noise."""
    x, is_target = latents.repeat(ROUNDS, 1, 1, 1), is_target.repeat(ROUNDS)
    shares, third = [], len(alphas) // 3
    for low in (0, third, 2 * third):
        t = torch.randint(low, low + third, (len(x),), generator=generator)
        noised = q_sample(x, torch.randn(x.shape, generator=generator), alphas[t])
        shares.append(float(((network(noised, alphas[t]) > 0) == is_target).float().mean()))
    return shares


def guide(network: LatentClassifier, scale: float) -> Callable[..., torch.Tensor]:
    """For ``correct`` of ddim: e' = e - sqrt(1 - a) scale grad_x log p(target | x_t).

    Dhariwal & Nichol 2021, algorithm 2.
    """

    def correct(x, noise, t, alpha):
        with torch.enable_grad():
            x = x.detach().float().requires_grad_()
            (gradient,) = torch.autograd.grad(F.logsigmoid(network(x, alpha)).sum(), x)
        return noise - scale * (1 - alpha).sqrt() * gradient.to(noise)

    return correct
