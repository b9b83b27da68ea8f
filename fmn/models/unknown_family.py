"""Models that are none of ``families.FAMILIES``: layers come from the loaded model, or a file.

Layers are named as in a LoRA file, ``lora_unet_`` and its path with dots as underscores. That
cannot be turned back into a path: the model a patch is applied to tells which layer is meant.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ForgetError
from .families import Family, Layer
from .transformers import Reader, Transformer

KEY = "other"
PREFIX = "lora_unet_"
NAME = re.compile(r"(lora_unet_|diffusion_model\.|transformer\.)([\w.]{1,200})", re.ASCII)
MODEL = re.compile(r"\w{1,80}", re.ASCII)  # ComfyUI's class of the model
MAX_LAYERS = 8192
MAX_ENTRIES = 1 << 30  # of one weight; 4 GiB in float32

# The attention through which the text comes in, by paths of ComfyUI's modules. In joint attention
# these are the projections of the text.
CROSS_ATTENTION = re.compile(
    r"""(.*\.)?(
    context_block\.attn\.(qkv|proj)  # Stable Diffusion 3
    | txt_attn\.(qkv|proj)  # Flux, Chroma
    | double_layers\.\d+\.attn\.w1[qkvo]  # AuraFlow
    | double_stream_blocks\.\d+\.block\.attn1\.to_([qkv]|out)_t  # HiDream
    | cross_attn\.(q_linear|kv_linear|proj)  # PixArt
    | attn2\.(q_proj|kv_proj|out_proj)  # HunyuanDiT
    | attn2\.to_(q|k|v|out\.0)  # U-Nets with other blocks than those we know
    )""",
    re.VERBOSE,
)
# Where queries, keys and values are one matrix, keys and values alone cannot be named.
KEYS_AND_VALUES = re.compile(
    r"""(.*\.)?(
    double_layers\.\d+\.attn\.w1[kv]
    | double_stream_blocks\.\d+\.block\.attn1\.to_[kv]_t
    | cross_attn\.kv_linear
    | attn2\.(kv_proj|to_k|to_v)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class UnknownLayer(Layer):
    """A Linear or Conv2d; ``compvis`` is its path, or its name again where only that is known."""

    @property
    def is_key_or_value(self) -> bool:
        return KEYS_AND_VALUES.fullmatch(self.compvis) is not None

    @property
    def is_cross_attention(self) -> bool:
        return CROSS_ATTENTION.fullmatch(self.compvis) is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class UnknownFamily(Family):
    """One model: ``listed`` are its layers, or, of a patch file, those it changes.

    ``entry`` is what we know of it, if anything.
    """

    listed: tuple[UnknownLayer, ...]
    entry: Transformer | None = None

    implementation = "https://github.com/comfyanonymous/ComfyUI"

    @property
    def model(self) -> str:
        """ComfyUI's class of the model."""
        return self.base_version

    def is_same(self, other: Family) -> bool:
        """Whether the other is the same class of model, and of the same transformers as far as both
        are known; layers are compared one by one."""
        if not isinstance(other, UnknownFamily) or other.model != self.model:
            return False
        return not self.entry or not other.entry or other.entry.key == self.entry.key

    def denoiser_layers(self) -> tuple[Layer, ...]:
        return self.listed

    def marking(self) -> Sequence[Layer]:
        readers = self.readers()
        return [layer for layer in self.listed if layer.name in readers] or super().marking()

    def readers(self) -> dict[str, Reader]:
        """Name of each layer through which text reaches the picture -> its ``Reader``."""
        return self._named(self.entry.readers if self.entry else ())

    def text_readers(self) -> dict[str, Reader]:
        """Name of each layer that reads nothing but text -> its ``Reader``."""
        return self._named(self.entry.text_readers if self.entry else ())

    def _named(self, readers: Sequence[Reader]) -> dict[str, Reader]:
        names = {layer.compvis: layer.name for layer in self.listed}
        return {names[path]: reader for path, reader in Transformer.paths(readers, names)}


def _family(
    model: str, layers: Iterable[UnknownLayer], entry: Transformer | None, **more: Any
) -> UnknownFamily:
    about: dict[str, Any] = {
        "title": entry.title if entry else model,
        "architecture": entry.architecture if entry else model,
        "resolution": 1024,
    }
    return UnknownFamily(
        key=KEY, base_version=model, listed=tuple(layers), entry=entry, **about | more
    )


def family_of_model(
    model: str,
    shapes: Mapping[str, Sequence[int]],
    entry: Transformer | None = None,
    **more: Any,
) -> UnknownFamily:
    """The family of a loaded model.

    Args:
        model: name of its class.
        shapes: path of each Linear and Conv2d -> shape of its weight, in the model's order.
        entry, more: fields of the family.

    Raises:
        ForgetError: there are no such layers, or two of them have one name in a LoRA file.
    """
    names = {path: PREFIX + path.replace(".", "_") for path in shapes}
    duplicates = [name for name, count in Counter(names.values()).items() if count > 1]
    if not shapes or duplicates:
        has = (
            f"two layers called {duplicates[0]}"
            if duplicates
            else "no plain Linear or Conv2d layers"
        )
        raise ForgetError(
            f"{model} has {has}, so no LoRA can be made for it: load it with the stock loader and "
            "without quantisation, or use another model."
        )
    layers = [UnknownLayer(names[path], path, tuple(shape)) for path, shape in shapes.items()]
    return _family(model, layers, entry, **more)


def family_of_file(
    file: str,
    model: str | None,
    entry: Transformer | None,
    factors: Mapping[str, Mapping[str, Sequence[int]]],
) -> UnknownFamily:
    """The family that an untrusted patch file claims to be for, within bounds.

    Args:
        file: its name, for errors.
        model: the class of the model that its metadata name, or None.
        entry: the transformer that they name, or None.
        factors: name of each layer -> shapes of "up" and "down", as far as they are there.
    """
    if model is None or not MODEL.fullmatch(model):
        raise ForgetError(
            f"'{file}' names the model {model!r:.40}, which is no name of a model class: "
            "get another file."
        )
    if len(factors) > MAX_LAYERS:
        raise ForgetError(
            f"'{file}' changes {len(factors)} layers, we read at most {MAX_LAYERS}: get another "
            "file."
        )
    layers = [_claimed(file, name, entry, shapes) for name, shapes in factors.items()]
    return _family(model, layers, entry)


def _claimed(
    file: str, name: str, entry: Transformer | None, shapes: Mapping[str, Sequence[int]]
) -> UnknownLayer:
    match = NAME.fullmatch(name)
    path = None if match is None else _path(match[1], match[2], entry)
    if path is None:
        raise ForgetError(
            f"'{file}' holds the layer {name!r:.80}, which is no name of a LoRA's layer: "
            "it is no forget patch."
        )
    up, down = (tuple(shapes.get(part, ())) for part in ("up", "down"))
    shape = (*up[:1], *down[1:])
    if len(down) not in (2, 4) or len(up) != len(down) or not 0 < math.prod(shape) <= MAX_ENTRIES:
        raise ForgetError(
            f"'{file}' has lora_down {list(down)!s:.40} and lora_up {list(up)!s:.40} for "
            f"'{name:.80}', which make no weight of 1 to {MAX_ENTRIES} numbers: get it again."
        )
    return UnknownLayer(PREFIX + path.replace(".", "_").removeprefix(PREFIX), path, shape)


def _path(style: str, name: str, entry: Transformer | None) -> str | None:
    """ComfyUI's path of a layer by its name in a file, or kohya's name where that cannot tell."""
    if style == "transformer.":
        return entry.renamed(name, "diffusers", "comfy") if entry else None
    if style == PREFIX and "." in name:
        return None
    if style == PREFIX:
        return (entry and entry.renamed(name, "kohya", "comfy")) or style + name
    return name
