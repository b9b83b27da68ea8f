"""Inpainting: does the model fill a hole in the target's picture with the target?

One of the probes of Lu et al. 2025 (arXiv 2505.17013); see ``probing``.
"""

from collections.abc import Sequence

import torch

from ...models.image_sampler import ImageSampler
from ...models.interface import Text
from .probing import draw_latents
from .trial import Ask, Result, Trial


def inpainting(trial: Trial) -> Result:
    """Cut a hole of half the side from the untouched picture and let the model fill it.

    What counts is what the hole alone shows, with white around it, as in the paper.
    Cost: ``trial.count`` pictures, and 2 * ``trial.count`` untouched, kept.

    Returns:
        rows: with still and untouched (the hole alone, filled by either model), ``whole`` and
        ``untouched_whole`` (with the real picture around it), and what that shows anyway: with a
        white hole (``white``), and with one filled smoothly from its edges (``smooth``).
    """
    asks = trial.target_asks()
    pictures = trial.untouched(asks)
    filled = inpaint(trial, asks, pictures)
    keys = [("inpainted", ask.prompt, ask.seed) for ask in asks]
    before = trial.cached(
        keys, lambda missing: inpaint(trial, [asks[i] for i in missing], pictures[missing])
    )
    hole, white = centred_hole(trial.sampler.sampling.size)[..., None], torch.ones_like(pictures)
    judged = {
        "still": torch.where(hole, filled, white),
        "untouched": torch.where(hole, before, white),
        "whole": torch.where(hole, filled, pictures),
        "untouched_whole": torch.where(hole, before, pictures),
        "white": torch.where(hole, white, pictures),
        "smooth": smooth_hole(pictures),
    }
    shown = {name: trial.shows_target(images) for name, images in judged.items()}
    rows = [
        {"prompt": ask.prompt, "seed": ask.seed} | {name: shown[name][i] for name in shown}
        for i, ask in enumerate(asks)
    ]
    return {"rows": rows, "settings": {"hole": 0.5}}


def centred_hole(side: int) -> torch.Tensor:  # bool [side, side]
    """Where the hole is: the middle half of either axis."""
    inside = (torch.arange(side) >= side // 4) & (torch.arange(side) < side - side // 4)
    return inside[:, None] & inside


def smooth_hole(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures whose hole is the mean of two linear blends, of its sides and of top and bottom."""
    side, filled = pictures.shape[1], pictures.clone()
    low, high = side // 4, side - side // 4
    share = torch.arange(1, high - low + 1)[:, None] / (high - low + 1)
    rows, columns = pictures[:, low:high], pictures[:, :, low:high]
    across = torch.lerp(rows[:, :, low - 1, None], rows[:, :, high, None], share)
    down = torch.lerp(columns[:, low - 1, None], columns[:, high, None], share[:, None])
    filled[:, low:high, low:high] = (across + down) / 2
    return filled


def inpaint(trial: Trial, asks: Sequence[Ask], pictures: torch.Tensor) -> torch.Tensor:
    """Pictures whose hole the model as it is now has filled."""
    sampler, size = trial.sampler, trial.sampler.sampling.size
    # Grey below the hole: the encoder would leak what was there into its neighbourhood.
    holed = pictures.masked_fill(centred_hole(size)[..., None], 0.5)
    known = dict(zip(asks, sampler.model.encode_images(holed, size).float().cpu()))

    def latents(part: Sequence[Ask], text: Text, start: torch.Tensor) -> torch.Tensor:
        return inpainted_latents(sampler, text, start, torch.stack([known[ask] for ask in part]))

    return draw_latents(trial, asks, latents)


def inpainted_latents(
    sampler: ImageSampler, text: Text, start: torch.Tensor, known: torch.Tensor
) -> torch.Tensor:
    """Latents [B, 4, h, w] that equal ``known`` outside of the hole.

    After each step the outside is replaced by ``known`` at that step's noise level, as diffusers'
    inpainting pipeline does with a text-to-image model. ``start`` is the noise for both.
    """

    def after(x: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        outside = following.sqrt() * known.to(x) + (1 - following).sqrt() * start.to(x)
        return torch.where(centred_hole(start.shape[-1]).to(x.device), x, outside)

    return sampler.latents(text, start, after=after)
