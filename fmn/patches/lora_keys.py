"""The names of layers in a LoRA file.

kohya's names are read by every loader we know: ComfyUI, A1111, Forge, diffusers, sd-scripts. They
are ``lora_unet_`` and the layer's path with dots as underscores: diffusers' path for Stable
Diffusion 1.x and 2.x, the CompVis path for XL. Readers also know the other one, so we read both.
Text encoders are ``lora_te_``, or ``lora_te1_`` and ``lora_te2_`` where there are two.

Transformers have three styles, none of which every program reads; ``Transformer.file`` is the one
that most read. All layers of a file have the same style, as diffusers wants it.
- "kohya": ``lora_unet_`` and ComfyUI's path, the name of layers of an ``UnknownFamily``.
- "path": ``diffusion_model.`` and ComfyUI's path.
- "peft": ``transformer.`` and diffusers' path.
The last two call factors A and B and have no alpha, which diffusers refuses in some families.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from ..models.families import Family, Layer, UNetFamily, layers, text_layers
from ..models.unknown_family import UnknownFamily

PARTS = ("lora_down.weight", "lora_up.weight")
PEFT_PARTS = ("lora_A.weight", "lora_B.weight")
KOHYA = "kohya"
ALPHA = "alpha"  # divided by the rank, scales a layer; without one the scale is 1
MAX_TAG = 100  # letters


def tag_name(text: str) -> str:
    """A name for <lora:NAME:1>, whose parts end at : and >: letters, digits and ,.-_ of a text."""
    return " ".join(re.sub(r"[^\w,.-]+", " ", text)[:MAX_TAG].split())


def split_key(key: str) -> tuple[str, str]:
    """(prefix of a layer, "down", "up" or "alpha") of a tensor's key; part "" for any other."""
    ends = {PARTS[0]: "down", PEFT_PARTS[0]: "down", PARTS[1]: "up", PEFT_PARTS[1]: "up"}
    for end, part in (ends | {ALPHA: ALPHA}).items():
        if key.endswith(f".{end}"):
            return key[: -len(end) - 1], part
    return key, ""


class FileNames(NamedTuple):
    """How layers are called in a file, and the ends of their tensors' names.

    Attributes:
        parts: of lora_down and lora_up.
    """

    names: Mapping[Layer, str]
    parts: tuple[str, str]

    def keys(self, layer: Layer) -> list[str]:
        """The keys of lora_down and lora_up."""
        return [f"{self.names[layer]}.{part}" for part in self.parts]


def file_names(family: Family, wanted: Iterable[Layer], style: str = "") -> FileNames:
    """The names under which we write these layers into one file.

    Args:
        style: of transformers; "" for the one that most programs read, if all layers have it.
    """
    if not isinstance(family, UnknownFamily):
        return FileNames({layer: file_name(family, layer) for layer in wanted}, PARTS)
    names = {layer: _styles(family, layer) for layer in wanted}
    style = style or (family.entry.file if family.entry else KOHYA)
    if not all(style in styles for styles in names.values()):
        style = KOHYA
    chosen = {layer: styles[style] for layer, styles in names.items()}
    return FileNames(chosen, PARTS if style == KOHYA else PEFT_PARTS)


def _styles(family: UnknownFamily, layer: Layer) -> dict[str, str]:
    """The layer's name by each style, as far as it has one."""
    styles = {KOHYA: layer.name}
    if layer.compvis != layer.name:
        styles["path"] = f"diffusion_model.{layer.compvis}"
        peft = family.entry and family.entry.renamed(layer.compvis, "comfy", "diffusers")
        if peft:
            styles["peft"] = f"transformer.{peft}"
    return styles


def file_name(family: Family, layer: Layer) -> str:
    """The name we write by kohya's style."""
    if not isinstance(family, UNetFamily):
        return layer.name
    if layer.is_text:
        return _text_name(family, layer)
    return _unet_name(layer.compvis if family.stability_names else layer.name)


def known_names(family: Family) -> Mapping[str, Layer]:
    """Every name a file of this family may use -> its ``Layer``."""
    if not isinstance(family, UnknownFamily):
        return _known_names(family)
    return {name: layer for layer in layers(family) for name in _styles(family, layer).values()}


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
