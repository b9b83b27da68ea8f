"""Opens any model that diffusers can run here, by name or path."""

from __future__ import annotations

from pathlib import Path
from platform import node

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


def open_same(
    path: str, fingerprint: str, vae: str = "", prediction: str = ""
) -> DiffusersModel | DiffusersTransformer:
    """The model of a run, where one of its workers is; options as given there, or "".

    Raises:
        ForgetError: it is missing, or another.
    """
    model = open_model(path, vae=vae or None, prediction=prediction or None)
    if model.fingerprint() != fingerprint:
        raise ForgetError(
            f"The model at '{path}' on {node()} has other weights than the one the run began with: "
            "put the same file there."
        )
    return model
