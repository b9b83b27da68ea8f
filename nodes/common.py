"""What several nodes share: schemas, inputs, and how text, files and pictures go in and out."""

import inspect
import os
import re
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

from .types import CATEGORY, Keep

MAX_SEED = 2**53  # a page's numbers are exact up to here
ENTRY = re.compile(r"^    ([\w ]+): (.+(?:\n {8}.+)*)", re.MULTILINE)  # NAME: TEXT, in a docstring


def schema(
    node: type[io.ComfyNode], node_id: str, title: str, inputs: list[io.Input],
    outputs: list[io.Output], **more: Any,
) -> io.Schema:  # fmt: skip
    """The schema of a node, with the texts of its docstring: what it does, then tooltips, those
    below ``Inputs:`` by name and those below ``Outputs:`` in their order."""
    above, _, below = (inspect.getdoc(node) or "").partition("\n\nOutputs:\n")
    about, inputs = _one_line(above.partition("\n\nInputs:\n")[0]), described(above, inputs)
    for output, (_, text) in zip(outputs, ENTRY.findall(below), strict=True):
        output.tooltip = _one_line(text)
    return io.Schema(node_id, title, CATEGORY, inputs, outputs, description=about, **more)


def described(text: str, inputs: list[io.Input]) -> list[io.Input]:
    """The same inputs, with the tooltips that stand below ``Inputs:`` in a docstring."""
    tooltips = dict(ENTRY.findall(text.partition("\n\nInputs:\n")[2]))
    for each in inputs:
        each.tooltip = _one_line(tooltips.get(each.id, each.tooltip))
    return inputs


def _one_line(text: str) -> str:
    return " ".join(text.split())


def model_input() -> io.Input:
    return io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL.")


def clip_input() -> io.Input:
    return io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint.")


def vae_input() -> io.Input:
    return io.Vae.Input("vae", tooltip="The VAE of the same checkpoint.")


def keep_input() -> io.Input:
    return Keep.Input(
        "keep",
        optional=True,
        tooltip="Words and prompts that must not change, for methods that can protect some. "
        "Empty: the method's own keep-list.",
    )


def strength_input(optional: bool = False) -> io.Input:
    return io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, optional=optional)


def seed_input(name: str, most: int = MAX_SEED) -> io.Input:
    """Not called "seed": the page would change such a widget after every run."""
    return io.Int.Input(name, default=0, min=0, max=most)


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


def file_names(kind: str) -> dict[str, str]:
    """Names on ComfyUI's list of a kind of files, with slashes -> as they are listed."""
    return {name.replace(os.sep, "/"): name for name in folder_paths.get_filename_list(kind)}


def listed_file(kind: str, name: str) -> Path | None:
    """The file of a name on that list. No other name is looked up: ComfyUI's lookup strips what
    leads out of the folders."""
    listed = file_names(kind).get(name.replace(os.sep, "/"))
    path = folder_paths.get_full_path(kind, listed) if listed else None
    return Path(path) if path else None


def file_stamp(path: str | Path | None) -> str:
    """Changes when the file changes, for ``fingerprint_inputs``; empty for None."""
    stat = os.stat(path) if path else None
    return f"{stat.st_mtime_ns} {stat.st_size}" if stat else ""


def image_of(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE: [1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy())[None].float() / 255
