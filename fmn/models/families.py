"""The model families we can edit: which layers they have, and what each is called.

A U-Net layer has two names. CompVis/Stability code and ComfyUI count blocks
(``input_blocks.4.1``), diffusers groups them by level (``down_blocks.1.attentions.0``).
``layers`` derives both, and the weight's shape, from a handful of numbers, so a patch file can be
checked before any model is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar

from ..errors import ForgetError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """One Linear or Conv2d of a denoiser, or one Linear of a text encoder.

    Attributes:
        name: diffusers' path, our canonical name; a text encoder's begins with its part of the
            pipeline, ``text_encoder`` or ``text_encoder_2``.
        compvis: path under ComfyUI's ``diffusion_model`` or ``cond_stage_model``.
        shape: of the weight: [out, in] or [out, in, kh, kw].
    """

    name: str
    compvis: str
    shape: tuple[int, ...]

    @property
    def is_text(self) -> bool:
        return self.name.startswith("text_encoder")

    @property
    def is_key_or_value(self) -> bool:
        return self.name.endswith((".attn2.to_k", ".attn2.to_v"))

    @property
    def is_cross_attention(self) -> bool:
        return ".attn2." in self.name


@dataclass(frozen=True)
class CLIPConfig:
    """A CLIP text encoder: ComfyUI's name for it, and the size of its transformer."""

    comfy: str
    blocks: int
    width: int


CLIP_L = CLIPConfig("clip_l", 12, 768)
# The last of OpenCLIP-H's 24 blocks is never used, and diffusers' copies of it lack it.
CLIP_H = CLIPConfig("clip_h", 23, 1024)
CLIP_G = CLIPConfig("clip_g", 32, 1280)


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Models that share their layers, so that a patch made on one fits the others."""

    known: ClassVar[bool] = False  # a U-Net whose layers follow from a few numbers
    texts: tuple[CLIPConfig, ...] = ()  # text encoders that patches can change

    key: str
    title: str
    resolution: int  # pixels a side the family was trained at
    architecture: str  # modelspec.architecture, without "/lora"
    base_version: str  # kohya's ss_base_model_version
    latent_channels: int = 4
    latent_factor: int = 8  # pixels a side for one of the latent

    @property
    def implementation(self) -> str:
        """modelspec.implementation: whose names the layers have in a file."""
        raise NotImplementedError

    def is_same(self, other: "Family") -> bool:
        return self is other

    def denoiser_layers(self) -> "tuple[Layer, ...]":
        """See ``layers``."""
        raise NotImplementedError

    def marking(self) -> "Sequence[Layer]":
        """The layers that tell one base model from another; see ``interface.fingerprint``."""
        every = self.denoiser_layers()
        return [layer for layer in every if layer.is_key_or_value] or every


@dataclass(frozen=True, kw_only=True, eq=False)
class UNetFamily(Family):
    """U-Nets of Stable Diffusion's kind, whose layers follow from these numbers."""

    known = True

    texts: tuple[CLIPConfig, ...] = (CLIP_L,)
    channels: tuple[int, ...]  # a level, from the picture's side inwards
    blocks: int  # residual blocks a level on the way down (one more on the way up)
    depth: tuple[int, ...]  # transformer blocks after each residual block, a level
    middle_depth: int
    context_dim: int  # width of a text token
    linear_projection: bool  # proj_in and proj_out are Linear instead of 1x1 Conv2d
    stability_names: bool = False  # kohya names SDXL layers after CompVis blocks
    vector_dim: int | None = None  # width of pooled text and size conditioning

    @property
    def implementation(self) -> str:
        stability = "https://github.com/Stability-AI/generative-models"
        return stability if self.stability_names else "diffusers"

    def denoiser_layers(self) -> tuple[Layer, ...]:
        return _unet_layers(self)


SD1 = UNetFamily(
    key="sd1", title="Stable Diffusion 1.x", channels=(320, 640, 1280, 1280), blocks=2,
    depth=(1, 1, 1, 0), middle_depth=1, context_dim=768, linear_projection=False, resolution=512,
    architecture="stable-diffusion-v1", base_version="sd_v1",
)  # fmt: skip
SD2 = UNetFamily(
    key="sd2", title="Stable Diffusion 2.x", channels=(320, 640, 1280, 1280), blocks=2,
    depth=(1, 1, 1, 0), middle_depth=1, context_dim=1024, linear_projection=True, resolution=512,
    architecture="stable-diffusion-v2-512", base_version="sd_v2", texts=(CLIP_H,),
)  # fmt: skip
SDXL = UNetFamily(
    key="sdxl", title="Stable Diffusion XL", channels=(320, 640, 1280), blocks=2,
    depth=(0, 2, 10), middle_depth=10, context_dim=2048, linear_projection=True, resolution=1024,
    architecture="stable-diffusion-xl-v1-base", base_version="sdxl_base_v1-0",
    stability_names=True, vector_dim=2816, texts=(CLIP_L, CLIP_G),
)  # fmt: skip
DEMO = UNetFamily(
    key="demo", title="Forget-Me-Not demo model", channels=(64, 128, 192), blocks=1,
    depth=(0, 1, 1), middle_depth=1, context_dim=128, linear_projection=False, resolution=128,
    architecture="stable-diffusion-v1", base_version="sd_v1",
    texts=(CLIPConfig("clip_l", 3, 128),),
)  # fmt: skip
FAMILIES = {family.key: family for family in (SD1, SD2, SDXL, DEMO)}


def _resnet(name: str, compvis: str, c_in: int, c_out: int, time_dim: int) -> Iterator[Layer]:
    yield Layer(f"{name}.conv1", f"{compvis}.in_layers.2", (c_out, c_in, 3, 3))
    yield Layer(f"{name}.time_emb_proj", f"{compvis}.emb_layers.1", (c_out, time_dim))
    yield Layer(f"{name}.conv2", f"{compvis}.out_layers.3", (c_out, c_out, 3, 3))
    if c_in != c_out:
        yield Layer(f"{name}.conv_shortcut", f"{compvis}.skip_connection", (c_out, c_in, 1, 1))


def _transformer(
    name: str, compvis: str, c: int, depth: int, family: UNetFamily
) -> Iterator[Layer]:
    projection = (c, c) if family.linear_projection else (c, c, 1, 1)
    shapes = {
        "attn1.to_q": (c, c), "attn1.to_k": (c, c), "attn1.to_v": (c, c), "attn1.to_out.0": (c, c),
        "attn2.to_q": (c, c), "attn2.to_k": (c, family.context_dim),
        "attn2.to_v": (c, family.context_dim), "attn2.to_out.0": (c, c),
        "ff.net.0.proj": (8 * c, c), "ff.net.2": (c, 4 * c),
    }  # fmt: skip
    yield Layer(f"{name}.proj_in", f"{compvis}.proj_in", projection)
    for block in range(depth):
        for part, shape in shapes.items():
            path = f"transformer_blocks.{block}.{part}"
            yield Layer(f"{name}.{path}", f"{compvis}.{path}", shape)
    yield Layer(f"{name}.proj_out", f"{compvis}.proj_out", projection)


def _walk(family: UNetFamily) -> Iterator[Layer]:
    channels, last = family.channels, len(family.channels) - 1
    time_dim = 4 * channels[0]
    yield Layer("time_embedding.linear_1", "time_embed.0", (time_dim, channels[0]))
    yield Layer("time_embedding.linear_2", "time_embed.2", (time_dim, time_dim))
    if family.vector_dim:
        yield Layer("add_embedding.linear_1", "label_emb.0.0", (time_dim, family.vector_dim))
        yield Layer("add_embedding.linear_2", "label_emb.0.2", (time_dim, time_dim))
    yield Layer("conv_in", "input_blocks.0.0", (channels[0], 4, 3, 3))

    skips, c, n = [channels[0]], channels[0], 1
    for level, c_out in enumerate(channels):
        for i in range(family.blocks):
            down, block = f"down_blocks.{level}", f"input_blocks.{n}"
            yield from _resnet(f"{down}.resnets.{i}", f"{block}.0", c, c_out, time_dim)
            if family.depth[level]:
                names = f"{down}.attentions.{i}", f"{block}.1"
                yield from _transformer(*names, c_out, family.depth[level], family)
            c, n = c_out, n + 1
            skips.append(c)
        if level < last:
            conv = f"input_blocks.{n}.0.op", (c, c, 3, 3)
            yield Layer(f"down_blocks.{level}.downsamplers.0.conv", *conv)
            n += 1
            skips.append(c)

    yield from _resnet("mid_block.resnets.0", "middle_block.0", c, c, time_dim)
    middle = "mid_block.attentions.0", "middle_block.1"
    yield from _transformer(*middle, c, family.middle_depth, family)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", c, c, time_dim)

    n = 0
    for up, level in enumerate(reversed(range(len(channels)))):
        c_out = channels[level]
        for i in range(family.blocks + 1):
            names = f"up_blocks.{up}.resnets.{i}", f"output_blocks.{n}.0"
            yield from _resnet(*names, c + skips.pop(), c_out, time_dim)
            if family.depth[level]:
                names = f"up_blocks.{up}.attentions.{i}", f"output_blocks.{n}.1"
                yield from _transformer(*names, c_out, family.depth[level], family)
            c, n = c_out, n + 1
        if level > 0:
            index = 2 if family.depth[level] else 1
            conv = f"output_blocks.{n - 1}.{index}.conv", (c, c, 3, 3)
            yield Layer(f"up_blocks.{up}.upsamplers.0.conv", *conv)
    yield Layer("conv_out", "out.2", (4, channels[0], 3, 3))


def layers(family: Family) -> tuple[Layer, ...]:
    """Every Linear and Conv2d of the family's denoiser, in the order of a forward pass.

    The tuple is the one fixed order of layers: fingerprints and patch files follow it.
    """
    return family.denoiser_layers()


@cache
def _unet_layers(family: UNetFamily) -> tuple[Layer, ...]:
    return tuple(_walk(family))


@lru_cache(maxsize=16)  # families of unknown models come and go
def text_layers(family: Family) -> tuple[Layer, ...]:
    """Every Linear of the family's text encoders, in the order of a forward pass."""
    return tuple(
        layer for number, config in enumerate(family.texts) for layer in _text(number, config)
    )


def _text(number: int, config: CLIPConfig) -> Iterator[Layer]:
    part, c = "text_encoder" + ("_2" if number else ""), config.width
    shapes = {f"self_attn.{name}_proj": (c, c) for name in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    for block in range(config.blocks):
        for name, shape in shapes.items():
            path = f"text_model.encoder.layers.{block}.{name}"
            yield Layer(f"{part}.{path}", f"{config.comfy}.transformer.{path}", shape)


@lru_cache(maxsize=16)
def layers_by_name(family: Family) -> dict[str, Layer]:
    """Name -> ``Layer``, of the denoiser and the text encoders, in that order."""
    return {layer.name: layer for layer in (*layers(family), *text_layers(family))}


def cross_attention_names(family: Family) -> list[str]:
    """Names of the attn2 modules, in forward order."""
    names = [layer.name for layer in layers(family) if layer.name.endswith(".attn2.to_q")]
    return [name.removesuffix(".to_q") for name in names]


def identify(shapes: Mapping[str, tuple[int, ...]]) -> UNetFamily | None:
    """The family whose cross-attention has exactly these key and value layers, or None.

    Args:
        shapes: diffusers' or CompVis name of every attn2.to_k and attn2.to_v -> weight shape.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    for family in FAMILIES.values():
        expected = [layer for layer in layers(family) if layer.is_key_or_value]
        if shapes in (
            {layer.name: layer.shape for layer in expected},
            {layer.compvis: layer.shape for layer in expected},
        ):
            return family
    return None


def identify_unet(unet: "torch.nn.Module | None") -> UNetFamily | None:
    """``identify`` of a loaded U-Net."""
    modules = [] if unet is None else unet.named_modules()
    return identify(
        {
            name: module.weight.shape
            for name, module in modules
            if name.endswith((".attn2.to_k", ".attn2.to_v"))
        }
    )


def check_input_channels(channels: int) -> None:
    """Refuse a U-Net that reads anything but noise, a picture to edit, or a picture to fill.

    Raises:
        ForgetError: it is such a variant.
    """
    if channels not in (4, 8, 9):
        raise ForgetError(
            f"This model reads {channels} channels, and only 4, 8 (editing models) and 9 "
            "(inpainting models) can be trained on: train on its base model and apply the "
            "patch to this one."
        )
