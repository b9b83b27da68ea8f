"""Patches merged into a checkpoint file, without loading the model it holds."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import ForgetError
from .families import identify, layers
from .files import write_whole

UNET_PREFIX = "model.diffusion_model."
KEYS_AND_VALUES = ".attn2.to_k.weight", ".attn2.to_v.weight"


def checkpoint_family(path):
    """The family of a CompVis-style checkpoint, from the shapes in its header.

    Raises:
        ForgetError: not a safetensors file, or of no family we know.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kv = {
                key[len(UNET_PREFIX) : -len(".weight")]: file.get_slice(key).get_shape()
                for key in file.keys()  # noqa: SIM118 - a handle, not a dict
                if key.startswith(UNET_PREFIX) and key.endswith(KEYS_AND_VALUES)
            }
    except (SafetensorError, OSError) as error:
        raise ForgetError(
            f"'{path}' is damaged or not a safetensors checkpoint ({error}): get it again."
        ) from error
    family = identify(kv)
    if family is None:
        raise ForgetError(
            f"'{Path(path).name}' is no checkpoint we know: it has {len(kv)} cross-attention key "
            "and value layers; Stable Diffusion 1.x, 2.x and XL are supported."
        )
    return family


def merge_into_checkpoint(source, patches, target):
    """Write ``source`` with patches merged in; all else stays as it is, bit by bit.

    Args:
        patches: list of (ForgetPatch, strength). Changes are added in float32, then rounded to
            each weight's own precision.
    """
    family = checkpoint_family(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for patch, _ in patches:
        patch.check_family(family)
    for layer in layers(family):
        changes = [
            strength * patch.change_of(layer.name)
            for patch, strength in patches
            if layer.name in patch.changes
        ]
        if changes:
            key = f"{UNET_PREFIX}{layer.compvis}.weight"
            weight = tensors.get(key)
            if weight is None or tuple(weight.shape) != layer.shape:
                found = "missing" if weight is None else f"of shape {list(weight.shape)}"
                raise ForgetError(
                    f"The patch changes '{layer.compvis}' of shape {list(layer.shape)}, which is "
                    f"{found} in '{Path(source).name}': use a patch for this variant."
                )
            tensors[key] = (weight.float() + torch.stack(changes).sum(0)).to(weight.dtype)
    write_whole(target, lambda file: save_file(tensors, file, metadata=metadata))
