"""Patches merged into a checkpoint file, without loading the model it holds."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ForgetError
from ..files import write_whole
from ..models import unknown_family
from ..models.families import identify, layers_by_name
from ..models.interface import fingerprint

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


# Beside a weight that has to be multiplied by it, in quantised checkpoints.
SCALES = ".scale_weight", ".weight_scale"
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


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
            "and value layers; Stable Diffusion 1.x, 2.x and XL are supported, and other models "
            "inside ComfyUI, by the method ESD."
        )
    return family


def refuse_quantised(path):
    """Refuse a checkpoint whose weights mean something only together with scales beside them."""
    with safe_open(path, framework="pt") as file:
        told = "_quantization_metadata" in (file.metadata() or {})
        if told or any(key.endswith(SCALES) for key in file.keys()):  # noqa: SIM118
            raise ForgetError(
                f"'{Path(path).name}' holds quantised weights, which can neither be trained on nor "
                "changed in the file: use the same checkpoint in float16, bfloat16 or float32."
            )


def merge_into_checkpoint(source, patches, target):
    """Write ``source`` with patches merged in; all else stays as it is, bit by bit.

    Args:
        patches: list of (ForgetPatch, strength). Changes are added in float32, then rounded to
            each weight's own precision.
    """
    family = checkpoint_family(source)
    refuse_quantised(source)
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for patch, _ in patches:
        patch.check_family(family)
    for layer in layers_by_name(family).values():
        changes = [
            strength * patch.change_of(layer.name)
            for patch, strength in patches
            if layer.name in patch.changes
        ]
        if changes:
            key, rows = _place(family, layer)
            weight = tensors.get(key)
            if weight is None or tuple(weight[rows].shape) != layer.shape:
                found = "missing" if weight is None else f"in '{key}' of shape {list(weight.shape)}"
                raise ForgetError(
                    f"The patch changes '{layer.compvis}' of shape {list(layer.shape)}, which is "
                    f"{found} in '{Path(source).name}': use a patch for this variant."
                )
            if weight.dtype not in FLOATS:
                kind = str(weight.dtype).removeprefix("torch.")
                raise ForgetError(
                    f"'{key}' in '{Path(source).name}' is {kind}, in which a patch would be lost "
                    "to rounding: use the same checkpoint in float16, bfloat16 or float32."
                )
            changed = weight[rows].float() + torch.stack(changes).sum(0)
            weight[rows] = changed.to(weight.dtype)
    write_whole(target, lambda file: save_file(tensors, file, metadata=metadata))


def _place(family, layer):
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


pass

PREFIXES = UNET_PREFIX, ""  # a whole checkpoint; a diffusion model alone


def base_of(path):
    """(family's key, fingerprint) of a safetensors file, without loading the model.

    The key is "other" and the fingerprint "" for a model that is none of ``families.FAMILIES``.

    Raises:
        ForgetError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for prefix in PREFIXES:
                family = identify(_shapes(file, keys, prefix))
                if family:
                    return family.key, fingerprint(family, _weights(file, keys, prefix))
    except (SafetensorError, OSError) as error:
        raise ForgetError(
            f"'{path}' is damaged or not a safetensors checkpoint ({error}): get it again."
        ) from error
    return unknown_family.KEY, ""


def _shapes(file, keys, prefix):
    return {
        key[len(prefix) : -len(".weight")]: file.get_slice(key).get_shape()
        for key in keys
        if key.startswith(prefix) and key.endswith(KEYS_AND_VALUES)
    }


def _weights(file, keys, prefix):
    known = set(keys)

    def first_rows(layer):
        names = (f"{prefix}{name}.weight" for name in (layer.compvis, layer.name))
        return file.get_slice(next(name for name in names if name in known))[:4]

    return first_rows
