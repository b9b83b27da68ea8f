"""Opens any model that diffusers can run here, by name or path."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import ForgetError
from .model import DiffusersModel
from .transformer import DiffusersTransformer

NAME = "demo-dit"


def open_model(
    path: str | Path,
    device: torch.device | str | None = None,
    vae: str | Path | None = None,
    prediction: str | None = None,
) -> DiffusersModel | DiffusersTransformer:
    """The demo transformer for ``demo-dit``, else ``DiffusersModel.load``."""
    if str(path) != NAME:
        return DiffusersModel.load(path, device, vae, prediction)
    if vae or prediction:
        raise ForgetError(
            f"{NAME} has a VAE and predicts velocity: leave out --vae and --prediction."
        )
    return DiffusersTransformer.load_demo(device)
