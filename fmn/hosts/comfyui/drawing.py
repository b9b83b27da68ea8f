"""Draws pictures with ComfyUI's own sampler, on any MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ...errors import ForgetError
from .unknown_model import FLOWS

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


@torch.inference_mode()
def draw(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    prompts: Sequence[tuple[str, int]],
    side: int,
    steps: int,
    guidance: float,
    on_picture: Callable[[], object],
) -> list[Tensor]:
    """Pictures [H, W, 3] in 0..1 on the CPU, one for each (prompt, seed).

    As a KSampler with euler and the usual scheduler of the model would draw them.

    Args:
        side: pixels of a picture's sides.
        on_picture: called after each; may raise to cancel.
    """
    flow = isinstance(model.get_model_object("model_sampling"), FLOWS)
    scheduler = "simple" if flow else "normal"
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latents = []
    for text, seed in prompts:
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        factor = vae.downscale_ratio if isinstance(vae.downscale_ratio, int) else 8
        zeros = torch.zeros(1, vae.latent_channels, side // factor, side // factor)
        zeros = comfy.sample.fix_empty_latent_channels(model, zeros)
        noise = comfy.sample.prepare_noise(zeros, seed)
        latents.append(
            comfy.sample.sample(
                model, noise, steps, guidance, "euler", scheduler, conditioning, empty, zeros,
                disable_pbar=True, seed=seed,
            )
        )  # fmt: skip
        on_picture()
    pictures = [vae.decode(latent)[..., :3].float().cpu().clone() for latent in latents]
    if not all(picture.isfinite().all() for picture in pictures):
        raise ForgetError(
            "Pictures came out as numbers that are not finite: load the model or the VAE in "
            "bfloat16 or float32."
        )
    return [picture.reshape(-1, *picture.shape[-3:])[0].clamp(0, 1) for picture in pictures]
