"""What several nodes share: inputs, and how texts, files and pictures go in and out."""

import os

import numpy as np
import torch
from comfy_api.latest import io

from .types import Keep


def model_input():
    return io.Model.Input(
        "model",
        tooltip="Stable Diffusion 1.x, 2.x or XL. The method ESD also takes other "
        "models that draw pictures from text, such as Flux.",
    )


def keep_input():
    return Keep.Input(
        "keep",
        optional=True,
        tooltip="Words and prompts that shall not change, for the methods that can "
        "protect some. Empty: the method's own keep-list.",
    )


def strength_input(tooltip, optional=False):
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-4.0,
        max=4.0,
        step=0.05,
        optional=optional,
        tooltip=tooltip,
    )


def lines_of(text):
    """The lines of a widget that say something."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def stamp_of(path):
    """What changes when the file at a path does, for ``fingerprint_inputs``; empty for None."""
    stat = os.stat(path) if path else None
    return f"{stat.st_mtime_ns} {stat.st_size}" if stat else ""


def image_of(picture):
    """A PIL picture as ComfyUI's IMAGE, [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())[None].float() / 255
