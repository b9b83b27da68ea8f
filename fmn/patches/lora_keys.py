"""The names of layers in a LoRA file.

kohya's names are read by every loader we know: ComfyUI, A1111, Forge, diffusers, sd-scripts. They
are ``lora_unet_`` and the layer's path with dots as underscores: diffusers' path for Stable
Diffusion 1.x and 2.x, the CompVis path for XL. Readers also know the other one, so we read both.
Text encoders are ``lora_te_``, or ``lora_te1_`` and ``lora_te2_`` where there are two. Layers of an
``unknown_family.UnknownFamily`` have such names from the start.
"""

import re
from collections.abc import Mapping
from functools import cache

from ..models.families import Family, Layer, UNetFamily, layers, layers_by_name, text_layers

PARTS = ("lora_down.weight", "lora_up.weight")
ALPHA = "alpha"  # divided by the rank, scales a layer; without one the scale is 1
MAX_TAG = 100  # letters


def tag_name(text: str) -> str:
    """A name for <lora:NAME:1>, whose parts end at : and >: letters, digits and ,.-_ of a text."""
    return " ".join(re.sub(r"[^\w,.-]+", " ", text)[:MAX_TAG].split())


def file_name(family: Family, layer: Layer) -> str:
    """The name we write."""
    if not isinstance(family, UNetFamily):
        return layer.name
    if layer.is_text:
        return _text_name(family, layer)
    return _unet_name(layer.compvis if family.stability_names else layer.name)


def known_names(family: Family) -> Mapping[str, Layer]:
    """Every name a file of this family may use -> its ``Layer``."""
    return _known_names(family) if family.known else layers_by_name(family)


@cache
def _known_names(family: Family) -> Mapping[str, Layer]:
    names = {_unet_name(layer.name): layer for layer in layers(family)}
    names |= {_unet_name(layer.compvis): layer for layer in layers(family)}
    return names | {_text_name(family, layer): layer for layer in text_layers(family)}


def _unet_name(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def _text_name(family: Family, layer: Layer) -> str:
    part, _, path = layer.name.partition(".")
    number = "" if len(family.texts) == 1 else "2" if part.endswith("2") else "1"
    return f"lora_te{number}_{path.replace('.', '_')}"
