"""What several nodes share: inputs, and how text, files and pictures go in and out."""

import os
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from .types import Keep

STABLE_DIFFUSION = "Stable Diffusion 1.x, 2.x or XL."
MAX_SEED = 2**53  # a page's numbers are exact up to here


def model_input(tooltip: str = STABLE_DIFFUSION, optional: bool = False) -> io.Input:
    return io.Model.Input("model", tooltip=tooltip, optional=optional)


def clip_input(
    tooltip: str = "The CLIP of the same checkpoint.", optional: bool = False
) -> io.Input:
    return io.Clip.Input("clip", tooltip=tooltip, optional=optional)


def vae_input() -> io.Input:
    return io.Vae.Input("vae", tooltip="The VAE of the same checkpoint.")


def trained_model_input() -> io.Input:
    return model_input(
        "Stable Diffusion 1.x, 2.x or XL. The method ESD also trains other text-to-image models, "
        "such as Flux."
    )


def keep_input() -> io.Input:
    return Keep.Input(
        "keep",
        optional=True,
        tooltip="Words and prompts that must not change, for methods that can protect some. "
        "Empty: the method's own keep-list.",
    )


def strength_input(tooltip: str, optional: bool = False) -> io.Input:
    return io.Float.Input(
        "strength", default=1.0, min=-4.0, max=4.0, step=0.05, optional=optional, tooltip=tooltip
    )


def seed_input(name: str, tooltip: str, most: int = MAX_SEED) -> io.Input:
    """Not called "seed": the page would change such a widget after every run."""
    return io.Int.Input(name, default=0, min=0, max=most, tooltip=tooltip)


def advanced(*inputs: io.Input) -> list[io.Input]:
    """The same inputs, hidden by pages that can hide what few users change.

    The ``advanced`` argument came after ComfyUI 0.3.75, whose page already understands the entry.
    """
    for each in inputs:
        each.extra_dict["advanced"] = True
    return list(inputs)


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a multiline widget, without empty ones."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def file_stamp(path: str | Path | None) -> str:
    """Changes when the file changes, for ``fingerprint_inputs``; empty for None."""
    stat = os.stat(path) if path else None
    return f"{stat.st_mtime_ns} {stat.st_size}" if stat else ""


def image_of(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())[None].float() / 255
