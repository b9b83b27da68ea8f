"""What a layer is called in a LoRA file.

kohya's names are read by every loader we know: ComfyUI, A1111, Forge, diffusers, sd-scripts. They
are ``lora_unet_`` and the layer's path with dots as underscores: diffusers' path for Stable
Diffusion 1.x and 2.x, the CompVis path for XL. Readers also know the other one, so we read both.
Text encoders are ``lora_te_``, or ``lora_te1_`` and ``lora_te2_`` where there are two. Layers of an
``other.UnknownFamily`` are called like this from the start.
"""

from functools import cache

from ..models.families import layers, layers_by_name, text_layers

PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def _kohya(path):
    return "lora_unet_" + path.replace(".", "_")


def _kohya_text(family, layer):
    part, _, path = layer.name.partition(".")
    number = "" if len(family.texts) == 1 else "2" if part.endswith("2") else "1"
    return f"lora_te{number}_{path.replace('.', '_')}"


def file_name(family, layer):
    """The name we write."""
    if not family.known:
        return layer.name
    if layer.is_text:
        return _kohya_text(family, layer)
    return _kohya(layer.compvis if family.stability_names else layer.name)


def known_names(family):
    """Every name a file of this family may use -> its ``Layer``."""
    return _known_names(family) if family.known else layers_by_name(family)


@cache
def _known_names(family):
    names = {_kohya(layer.name): layer for layer in layers(family)}
    names |= {_kohya(layer.compvis): layer for layer in layers(family)}
    return names | {_kohya_text(family, layer): layer for layer in text_layers(family)}
