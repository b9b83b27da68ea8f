"""Checkpoint files, read and patched without loading the model they hold."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import ForgetError
from ..files import AnyPath, open_safetensors, write_whole
from ..models import unknown_family
from ..models.families import Family, Layer, UNetFamily, identify, layers_by_name
from ..models.interface import fingerprint
from .patch import ForgetPatch

UNET_PREFIX = "model.diffusion_model."
KEYS_AND_VALUES = ".attn2.to_k.weight", ".attn2.to_v.weight"
# (text encoders of the family, ComfyUI's name of one) -> where a checkpoint keeps it
TEXT_PREFIXES = {
    (1, "clip_l"): "cond_stage_model.",
    (1, "clip_h"): "cond_stage_model.model.",
    (2, "clip_l"): "conditioner.embedders.0.",
    (2, "clip_g"): "conditioner.embedders.1.model.",
}
# OpenCLIP's encoders hold query, key and value as rows of one matrix.
FUSED = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
OPENCLIP = {
    **dict.fromkeys(FUSED, "attn.in_proj_weight"),
    "self_attn.out_proj": "attn.out_proj.weight",
    "mlp.fc1": "mlp.c_fc.weight",
    "mlp.fc2": "mlp.c_proj.weight",
}
# Quantised checkpoints keep the scale of a weight beside it.
SCALES = ".scale_weight", ".weight_scale"
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def base_of(path: AnyPath) -> tuple[str, str]:
    """(family's key, fingerprint) of a checkpoint, or of a diffusion model alone.

    The key is "other" and the fingerprint "" for a model that is none of ``families.FAMILIES``.

    Raises:
        ForgetError: not a safetensors file.
    """
    with open_safetensors(path) as file:
        for prefix in (UNET_PREFIX, ""):
            family = identify(_key_value_shapes(file, prefix))
            if family:
                return family.key, fingerprint(family, _first_rows(file, prefix))
    return unknown_family.KEY, ""


def checkpoint_family(path: AnyPath) -> UNetFamily:
    """The family of a CompVis-style checkpoint, from the shapes in its header.

    Raises:
        ForgetError: not a safetensors file, of an unsupported family, or quantised.
    """
    with open_safetensors(path) as file:
        shapes = _key_value_shapes(file, UNET_PREFIX)
        keys, metadata = file.keys(), file.metadata() or {}
        quantised = "_quantization_metadata" in metadata or any(k.endswith(SCALES) for k in keys)
    family, name = identify(shapes), Path(path).name
    if family is None:
        raise ForgetError(
            f"'{name}' is not a supported checkpoint: it has {len(shapes)} cross-attention key and "
            "value layers; Stable Diffusion 1.x, 2.x and XL are supported, and other models "
            "inside ComfyUI, by the method ESD."
        )
    if quantised:
        raise ForgetError(
            f"'{name}' holds quantised weights, which can neither be trained on nor changed in the "
            "file: use the same checkpoint in float16, bfloat16 or float32."
        )
    return family


def _key_value_shapes(file: Any, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name of each cross-attention key and value layer below the prefix -> shape of its weight."""
    return {
        key[len(prefix) : -len(".weight")]: tuple(file.get_slice(key).get_shape())
        for key in file.keys()  # noqa: SIM118 - a handle, not a dict
        if key.startswith(prefix) and key.endswith(KEYS_AND_VALUES)
    }


def _first_rows(file: Any, prefix: str) -> Callable[[Layer], torch.Tensor]:
    """Function from a layer to the rows of its weight that a fingerprint reads."""
    keys = set(file.keys())

    def first_rows(layer: Layer) -> torch.Tensor:
        names = (f"{prefix}{name}.weight" for name in (layer.compvis, layer.name))
        return file.get_slice(next(name for name in names if name in keys))[:4]

    return first_rows


def merge_into_checkpoint(
    source: AnyPath, patches: Sequence[tuple[ForgetPatch, float]], target: AnyPath
) -> None:
    """Write the checkpoint ``source`` with patches merged in; all else stays, bit for bit.

    Args:
        patches: (patch, strength) of each. Changes are added in float32, then rounded to each
            weight's own precision.
    """
    family, name = checkpoint_family(source), Path(source).name
    for patch, _ in patches:
        patch.check_family(family)
    with open_safetensors(source) as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for layer in layers_by_name(family).values():
        changes = [
            strength * patch.change_of(layer.name)
            for patch, strength in patches
            if layer.name in patch.changes
        ]
        if changes:
            weight = _weight(name, family, layer, tensors)  # a view
            weight.copy_(weight.float() + torch.stack(changes).sum(0))
    write_whole(target, lambda file: save_file(tensors, file, metadata=metadata))


def _weight(
    name: str, family: Family, layer: Layer, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A layer's weight in a checkpoint's tensors.

    Args:
        name: of the checkpoint, for messages.
    """
    key, rows = _place(family, layer)
    tensor = tensors.get(key)
    if tensor is None or tuple(tensor[rows].shape) != layer.shape:
        actual = "missing" if tensor is None else f"in '{key}' of shape {list(tensor.shape)}"
        raise ForgetError(
            f"The patch changes '{layer.compvis}' of shape {list(layer.shape)}, which is "
            f"{actual} in '{name}': use a patch for this variant."
        )
    if tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ForgetError(
            f"'{key}' in '{name}' is {dtype}, in which a patch would be lost to rounding: use the "
            "same checkpoint in float16, bfloat16 or float32."
        )
    return tensor[rows]


def _place(family: Family, layer: Layer) -> tuple[str, slice]:
    """The key of the tensor that holds a layer's weight, and which of its rows are the layer's."""
    if not layer.is_text:
        return f"{UNET_PREFIX}{layer.compvis}.weight", slice(None)
    encoder, _, path = layer.compvis.partition(".")
    prefix = TEXT_PREFIXES[len(family.texts), encoder]
    if encoder == "clip_l":
        return f"{prefix}{path}.weight", slice(None)
    block, _, part = path.removeprefix("transformer.text_model.encoder.layers.").partition(".")
    first = FUSED.index(part) * layer.shape[0] if part in FUSED else 0
    rows = slice(first, first + layer.shape[0]) if part in FUSED else slice(None)
    return f"{prefix}transformer.resblocks.{block}.{OPENCLIP[part]}", rows
