"""Checkpoint files, read and patched without loading the model they hold."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import ForgetError
from ..files import AnyPath, open_safetensors, write_whole
from ..models import unknown_family
from ..models.families import FAMILIES, Layer, UNetFamily, identify, layers, layers_by_name
from ..models.interface import fingerprint
from .file_kind import UNET, WHOLE, kind_of
from .foreign_file import ForeignFile, read_foreign
from .patch import ForgetPatch
from .weight_names import UNET_PREFIXES, find, places, take

KEYS_AND_VALUES = ".attn2.to_k.weight", ".attn2.to_v.weight"
SCALES = ".scale_weight", ".weight_scale"
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def base_of(path: AnyPath) -> tuple[str, str]:
    """(family's key, fingerprint) of a checkpoint, or of a diffusion model alone.

    The key is "other" and the fingerprint "" for a model that is none of ``families.FAMILIES``.

    Raises:
        ForgetError: not a safetensors file.
    """
    with open_safetensors(path) as file:
        for prefix in UNET_PREFIXES:
            family = identify(_key_value_shapes(file, prefix))
            if family:
                return family.key, fingerprint(family, _first_rows(file, prefix))
    return unknown_family.KEY, ""


def checkpoint_family(file: ForeignFile) -> UNetFamily:
    """The family of a checkpoint, from the shapes of its cross-attention keys and values.

    A few of them may be missing: who loads the file names what it lacks.

    Raises:
        ForgetError: it is no checkpoint, of an unsupported family, or quantised.
    """
    family = next(filter(lambda family: _is_of(file, family), FAMILIES.values()), None)
    if family is None:
        kind = kind_of(file.tensors) or "of no known kind"
        if kind in (UNET, WHOLE):
            kind = "a model of an unsupported family"
        raise ForgetError(
            f"'{file.name}' is {kind}, not a supported checkpoint: give one of Stable Diffusion "
            "1.x, 2.x or XL; other models can be trained inside ComfyUI, by the method ESD."
        )
    if "_quantization_metadata" in file.metadata or any(k.endswith(SCALES) for k in file.tensors):
        raise ForgetError(
            f"'{file.name}' holds quantised weights, which can neither be trained on nor changed "
            "in the file: use the same checkpoint in float16, bfloat16 or float32."
        )
    return family


def _is_of(file: ForeignFile, family: UNetFamily) -> bool:
    readers = [layer for layer in layers(family) if layer.is_key_or_value]
    keys = {
        place[0]: layer.shape for layer in readers if (place := find(file.tensors, places(layer)))
    }
    complete = len(keys) > 0.8 * len(readers)
    return complete and all(file.shape(key) == shape for key, shape in keys.items())


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
    file = read_foreign(Path(source))
    family, name = checkpoint_family(file), file.name
    for patch, _ in patches:
        patch.check_family(family)
    metadata, tensors = file.metadata or None, dict(file.tensors)
    for layer in layers_by_name(family).values():
        changes = [
            strength * patch.change_of(layer.name)
            for patch, strength in patches
            if layer.name in patch.changes
        ]
        if changes:
            weight = _weight(name, layer, tensors)  # a view
            weight.copy_(weight.float() + torch.stack(changes).sum(0))
    write_whole(target, lambda file: save_file(tensors, file, metadata=metadata))


def _weight(name: str, layer: Layer, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A layer's weight in a checkpoint's tensors.

    Args:
        name: of the checkpoint, for messages.
    """
    key, third = find(tensors, places(layer)) or ("", None)
    tensor = take(tensors, (key, third)) if key else torch.empty(0)
    if tuple(tensor.shape) != layer.shape:
        actual = f"in '{key}' of shape {list(tensors[key].shape)}" if key else "missing"
        raise ForgetError(
            f"The patch changes '{layer.compvis}' of shape {list(layer.shape)}, which is "
            f"{actual} in '{name}': use a patch for this variant."
        )
    if tensor.dtype not in FLOATS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ForgetError(
            f"'{key}' in '{name}' is {dtype}, in which a patch would be lost to rounding: use "
            "the same checkpoint in float16, bfloat16 or float32."
        )
    return tensor
