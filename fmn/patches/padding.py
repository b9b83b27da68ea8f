"""What a LoRA file needs for other programs, beside the changes: padding that changes nothing.

- A1111 changes an attention layer of OpenCLIP only if query, key, value and output are all there
  (``network_apply_weights`` in its networks.py).
- InvokeAI tells the base by the inputs of attn2's keys and values, else by those of a text
  encoder's attention, and takes other layers for SDXL (``lora_token_vector_length``).
- diffusers before 0.42 scales layers wrongly if ranks differ and there is no alpha
  (``get_peft_kwargs``); stable-diffusion.cpp scales layers of rank 1 wrongly if there is one, as it
  takes the last dimension above 1 for the rank (``get_lora_weight_diff``). So alpha is written only
  where ranks differ.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..models.families import Family, Layer, UNetFamily, layers, text_layers

Factors = tuple[torch.Tensor, torch.Tensor]  # up [out, r], down [r, in]
OPEN_CLIP = "clip_h", "clip_g"
BASES = 768, 1024, 2048  # widths of the text that InvokeAI knows
# Layers of a U-Net that sd-scripts makes no LoRA for; stable-diffusion.cpp loses the first four
# under diffusers' names.
NOT_EVERYWHERE = (
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    "add_embedding.linear_1", "add_embedding.linear_2",
)  # fmt: skip


def zero_layers(family: Family, changed: Collection[str]) -> list[Layer]:
    """Layers to write as zeros into the file of a patch that changes the layers ``changed``."""
    attention = {name.rpartition(".")[0] for name in changed if ".self_attn." in name}
    missing = [
        layer
        for layer in text_layers(family)
        if layer.compvis.startswith(OPEN_CLIP)
        and layer.name.rpartition(".")[0] in attention
        and layer.name not in changed
    ]
    readers = [layer for layer in layers(family) if layer.is_key_or_value]
    one_encoder = bool(attention) and len(family.texts) == 1
    base_is_told = one_encoder or any(layer.name in changed for layer in readers)
    known = isinstance(family, UNetFamily) and family.context_dim in BASES
    return missing if base_is_told or not known else [readers[0], *missing]


def padded(family: Family, changes: Mapping[Layer, Factors]) -> dict[Layer, Factors]:
    """The layers of a file: ``changes``, and zeros where a loader needs them.

    Zeros have the rank of the others, if that is one, so that the file needs no alpha.
    """
    different = ranks(changes)
    rank = min(different) if len(different) == 1 else 1
    zeros = {
        layer: (
            torch.zeros(layer.shape[0], rank, *(1,) * (len(layer.shape) - 2)),
            torch.zeros(rank, *layer.shape[1:]),
        )
        for layer in zero_layers(family, {layer.name for layer in changes})
    }
    return {**changes, **zeros}


def ranks(changes: Mapping[Any, Factors]) -> set[int]:
    """The different ranks of factors."""
    return {len(down) for _, down in changes.values()}


def without_padding(family: Family, changes: Mapping[str, Factors]) -> dict[str, Factors]:
    """The changes of a file that ``padded`` made, by name."""
    zeros = {name for name, (up, down) in changes.items() if not up.any() and not down.any()}
    added = {layer.name for layer in zero_layers(family, set(changes) - zeros)} & zeros
    return {name: factors for name, factors in changes.items() if name not in added}


def lost_elsewhere(family: Family, changes: Mapping[str, Factors]) -> list[str]:
    """Sentences on layers of a patch that other programs leave out or scale wrongly."""
    names = [name for name in NOT_EVERYWHERE if name in changes and family.known]
    notes = []
    if names:
        notes.append(
            f"kohya's sd-scripts and stable-diffusion.cpp leave out {', '.join(names)}, so there "
            "the patch does a little less"
        )
    if 1 in (different := ranks(changes)) and len(different) > 1:
        notes.append(
            "stable-diffusion.cpp applies layers of rank 1 too weakly where ranks differ, as here: "
            "for it, merge the patch into a checkpoint"
        )
    return notes
