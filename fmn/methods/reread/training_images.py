"""Pictures that a patch is hardened on: drawn by the model as it is, with the texts they show."""

from dataclasses import dataclass

import torch

from ...models.interface import Text, rows
from ...models.sampling import ddim, guided, q_sample

DRAWING_STEPS = 12
AT_ONCE = 4  # drawings
LOOKS = 0.3, 0.5, 0.7, 0.9  # shares of the schedule at which a style shows


@dataclass(frozen=True)
class Scene:
    """Noise-free latents [n, 4, h, w], and the texts they were drawn from; [n, 77, D] each.

    Attributes:
        other: the same texts without the concept; of kept scenes None.
        blanks: its prompts with ``PLACEHOLDER`` in place of the concept.
        index: which rows of the scene that it was chosen from.
    """

    latents: torch.Tensor
    text: Text
    other: Text | None = None
    blanks: tuple[str, ...] = ()
    index: torch.Tensor | None = None


def draw_scenes(denoiser, concepts, kept, styled, empty, settings, side, on_batch):
    """A ``Scene`` of each concept, and one of what is kept.

    Args:
        concepts: for each a ``Text`` [n, 77, D], the same without the concept, and its prompts
            with ``PLACEHOLDER`` in its place.
        kept: ``Text``. styled: for each style to forget the same in that style.
        empty: the empty prompt. settings: of ``reread``. side: of a latent.
        on_batch: called ``count`` times, after each batch of forwards.
    """
    scenes, (own, others) = [], picture_counts(settings)
    for text, other, blanks in concepts:
        turns = torch.arange(own) % len(text.context)
        text, other = rows(text, turns), rows(other, turns)
        scenes.append(draw_scene(denoiser, text, empty, settings, side, on_batch, other, blanks))
    turns = torch.arange(others) % len(kept.context)
    kept = draw_scene(denoiser, rows(kept, turns), empty, settings, side, on_batch)
    for text in styled:
        kept = least_like(denoiser, kept, rows(text, turns), settings, on_batch)
        turns = turns[kept.index]
    return scenes, kept


@torch.no_grad()
def draw_scene(denoiser, text, empty, settings, side, on_batch, other=None, blanks=()):
    """Draw texts with the model as it is: a ``Scene`` whose latents are on the CPU."""
    generator, found = torch.Generator().manual_seed(settings.seed), []
    for first in range(0, len(text.context), AT_ONCE):
        some = rows(text, slice(first, first + AT_ONCE))
        noise = torch.randn(len(some.context), 4, side, side, generator=generator)
        predict = guided(denoiser, some, empty, settings.guidance)
        noise = noise.to(denoiser.device)
        latents = ddim(predict, noise, denoiser.alphas_cumprod, DRAWING_STEPS)
        found.append(latents.float().cpu())
        on_batch()
    return Scene(torch.cat(found), text, other, blanks)


def count(settings, concepts, styles=0):
    """How many batches ``draw_scenes`` takes; ``styles`` of the concepts are styles."""
    if not settings.robust_steps:
        return 0
    own, left = picture_counts(settings)
    total = batches(own) * concepts + batches(left)
    for _ in range(styles):
        total += len(LOOKS) * batches(left)
        left = half(left)
    return total


def batches(pictures):
    return -(-pictures // AT_ONCE)


def half(pictures):
    return max(1, pictures // 2)


def picture_counts(settings):
    """Pictures drawn of each concept, and of all that is kept."""
    return settings.robust_pictures, 2 * settings.robust_pictures


@torch.no_grad()
def least_like(denoiser, scene, styled, settings, on_batch):
    """The half of a scene that looks least like a style.

    A model draws some style where it is asked for none. If that is to be forgotten, such pictures
    would keep it. They are told by the frozen model's error on them, given the prompt as it is and
    in the style (a diffusion classifier, Li et al. 2023, arXiv 2303.16203).

    Args:
        styled: the scene's prompts with the style.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    alphas, gain = denoiser.alphas_cumprod.cpu(), torch.zeros(len(scene.latents))
    for share in LOOKS:
        t = torch.full((len(scene.latents),), int(share * len(alphas)))
        noise = torch.randn(scene.latents.shape, generator=generator)
        x_t = q_sample(scene.latents, noise, alphas[t])
        for some in torch.arange(len(t)).split(AT_ONCE):
            for text, sign in ((scene.text, 1), (styled, -1)):
                place = x_t[some].to(denoiser.device), t[some].to(denoiser.device)
                found = denoiser.predict_noise(*place, rows(text, some)).float().cpu()
                gain[some] += sign * (found - noise[some]).square().flatten(1).mean(1)
            on_batch()
    best = gain.argsort()[: half(len(gain))].sort().values
    return Scene(scene.latents[best], rows(scene.text, best), index=best)
