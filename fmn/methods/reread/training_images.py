"""Pictures for adversarial training, drawn by the unpatched model, with the texts they show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...models.interface import Text, UNet
from ...models.sampling import ddim, guided, q_sample

DRAWING_STEPS = 12
AT_ONCE = 4  # pictures
STYLE_STEPS = 0.3, 0.5, 0.7, 0.9  # shares of the schedule at which a style shows

NO_TEXT = Text(torch.empty(0))


@dataclass(frozen=True)
class Scene:
    """Noise-free latents [n, 4, h, w], and the texts they were drawn from; [n, 77, D] each."""

    latents: torch.Tensor
    text: Text
    other: Text = NO_TEXT  # the same without the concept; empty of kept scenes
    blanks: tuple[str, ...] = ()  # its prompts with ``PLACEHOLDER`` in place of the concept
    index: torch.Tensor | None = None  # rows of the scene that this one was chosen from


def draw_scenes(
    denoiser: UNet,
    concepts: Sequence[tuple[Text, Text, tuple[str, ...]]],
    kept: Text,
    styled: Sequence[Text],
    empty: Text,
    settings: Any,
    side: int,
    on_batch: Callable[[], None],
) -> tuple[list[Scene], Scene]:
    """A ``Scene`` of each concept, and one of kept prompts.

    Args:
        concepts: for each a ``Text`` [n, 77, D], the same without the concept, and its prompts
            with ``PLACEHOLDER`` in its place.
        styled: for each style to forget the kept prompts in that style.
        side: of a latent.
        on_batch: called ``batch_count`` times, after each batch of forward passes.
    """
    scenes, (per_concept, per_kept) = [], image_counts(settings)
    for text, other, blanks in concepts:
        chosen = torch.arange(per_concept) % len(text.context)
        text, other = text[chosen], other[chosen]
        scenes.append(draw_scene(denoiser, text, empty, settings, side, on_batch, other, blanks))
    chosen = torch.arange(per_kept) % len(kept.context)
    scene = draw_scene(denoiser, kept[chosen], empty, settings, side, on_batch)
    for text in styled:
        scene = least_like(denoiser, scene, text[chosen], settings, on_batch)
        chosen = chosen[scene.index]
    return scenes, scene


@torch.no_grad()
def draw_scene(
    denoiser: UNet,
    text: Text,
    empty: Text,
    settings: Any,
    side: int,
    on_batch: Callable[[], None],
    other: Text = NO_TEXT,
    blanks: tuple[str, ...] = (),
) -> Scene:
    """Draw texts with the unpatched model: a ``Scene`` whose latents are on the CPU."""
    generator, batches = torch.Generator().manual_seed(settings.seed), []
    for first in range(0, len(text.context), AT_ONCE):
        some = text[first : first + AT_ONCE]
        noise = torch.randn(len(some.context), 4, side, side, generator=generator)
        predict = guided(denoiser, some, empty, settings.guidance)
        noise = noise.to(denoiser.device)
        latents = ddim(predict, noise, denoiser.alphas_cumprod, DRAWING_STEPS)
        batches.append(latents.float().cpu())
        on_batch()
    return Scene(torch.cat(batches), text, other, blanks)


def batch_count(settings: Any, concepts: int, styles: int = 0) -> int:
    """How many batches ``draw_scenes`` takes; ``styles`` of the concepts are styles."""
    if not settings.robust_steps:
        return 0
    per_concept, kept = image_counts(settings)
    total = _batches(per_concept) * concepts + _batches(kept)
    for _ in range(styles):
        total += len(STYLE_STEPS) * _batches(kept)
        kept = _half(kept)
    return total


def _batches(images: int) -> int:
    return -(-images // AT_ONCE)


def _half(images: int) -> int:
    return max(1, images // 2)


def image_counts(settings: Any) -> tuple[int, int]:
    """Pictures drawn of each concept, and of all kept prompts together."""
    return settings.robust_pictures, 2 * settings.robust_pictures


@torch.no_grad()
def least_like(
    denoiser: UNet, scene: Scene, styled: Text, settings: Any, on_batch: Callable[[], None]
) -> Scene:
    """The half of a scene that looks least like a style.

    A model draws some style where it is asked for none. If that one is to be forgotten, such
    pictures would keep it. A diffusion classifier (Li et al. 2023, arXiv 2303.16203) recognises
    them: the frozen model's error |e(x_t, prompt) - noise|^2 with and without the style.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    alphas, gain = denoiser.alphas_cumprod.cpu(), torch.zeros(len(scene.latents))
    for share in STYLE_STEPS:
        t = torch.full((len(scene.latents),), int(share * len(alphas)))
        noise = torch.randn(scene.latents.shape, generator=generator)
        x_t = q_sample(scene.latents, noise, alphas[t])
        for some in torch.arange(len(t)).split(AT_ONCE):
            noised = x_t[some].to(denoiser.device), t[some].to(denoiser.device)
            for text, sign in ((scene.text, 1), (styled, -1)):
                predicted = denoiser.predict_noise(*noised, text[some]).float().cpu()
                gain[some] += sign * (predicted - noise[some]).square().flatten(1).mean(1)
            on_batch()
    best = gain.argsort()[: _half(len(gain))].sort().values
    return Scene(scene.latents[best], scene.text[best], index=best)
