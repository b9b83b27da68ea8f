"""What a layer is called in a LoRA file.

kohya's names are read by every loader we know: ComfyUI, A1111, Forge, diffusers, sd-scripts. They
are ``lora_unet_`` and the layer's path with dots as underscores: diffusers' path for Stable
Diffusion 1.x and 2.x, the CompVis path for XL. Readers also know the other one, so we read both.
"""

from functools import cache

from .families import layers

PARTS = ("lora_down.weight", "lora_up.weight", "alpha")


def _kohya(path):
    return "lora_unet_" + path.replace(".", "_")


def file_name(family, layer):
    """The name we write."""
    return _kohya(layer.compvis if family.stability_names else layer.name)


@cache
def known_names(family):
    """Every name a file of this family may use -> its ``Layer``."""
    names = {_kohya(layer.name): layer for layer in layers(family)}
    return names | {_kohya(layer.compvis): layer for layer in layers(family)}
