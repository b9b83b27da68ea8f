"""The diffusion transformers whose text we can follow: through which layers it reaches the picture.

Paths are those of ComfyUI's modules, with ``{}`` for the number of a block, and of diffusers'. How
many blocks there are, and their shapes, come from the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The tokens that pass through a layer, in the order of the sequence.
PICTURE, TEXT_PICTURE, PICTURE_TEXT = "picture", "text_picture", "picture_text"
POOLED = "pooled"  # no tokens: one vector of the whole prompt
TEXT = "text"  # the prompt's tokens alone


class Reader(NamedTuple):
    """An output projection of attention, by which text changes the picture's tokens, or a layer
    that reads the text or the pooled text first. The order of tokens is ComfyUI's.

    ``fused``: behind what attention gives, which is as wide as the layer's output, its inputs hold
    those of the feed-forward part.
    """

    comfy: str
    diffusers: str
    tokens: str = PICTURE
    fused: bool = False

    @property
    def kohya(self) -> str:
        """ComfyUI's path as kohya's names have it."""
        return self.comfy.replace(".", "_")


@dataclass(frozen=True)
class Transformer:
    """A family of diffusion transformers.

    Attributes:
        network: ComfyUI's class of the network.
        model: ComfyUI's class of the model around it.
        marks: modules or parameters that it has, to tell it from others of the class; those with
            "!" in front it has not.
        readers: output projections and the layer of pooled text, in the order of a forward pass.
        text: the layers that read the text's tokens first; where all blocks read them, their keys
            and values.
        architecture: modelspec's name.
        file: how layers are named in a file so that most programs read it; see ``lora_keys``.
        patch: latents a side of a token.
        pad: the picture's tokens are padded to a multiple of this.
    """

    key: str
    title: str
    network: str
    model: str
    readers: tuple[Reader, ...]
    text: tuple[Reader, ...]
    architecture: str
    marks: tuple[str, ...] = ()
    file: str = "path"
    patch: int = 2
    pad: int = 1

    @property
    def text_readers(self) -> tuple[Reader, ...]:
        """All that reads nothing but text: the pooled text's layer, and those of its tokens."""
        return (*(reader for reader in self.readers if reader.tokens == POOLED), *self.text)

    @staticmethod
    def paths(readers: Sequence[Reader], known: Collection[str]) -> Iterator[tuple[str, Reader]]:
        """(ComfyUI's path, reader) of each of these readers among the paths of a loaded model."""
        for reader in readers:
            yield from ((path, reader) for path, _ in _numbered(reader.comfy, reader.comfy, known))

    def diffusers_paths(self, known: Collection[str]) -> Iterator[tuple[str, str]]:
        """(ComfyUI's path, diffusers' path) of each reader among the paths of diffusers' model."""
        for reader in (*self.readers, *self.text):
            yield from _numbered(reader.comfy, reader.diffusers, known)

    def renamed(self, path: str, given: str, wanted: str) -> str | None:
        """A reader's path by another naming: "comfy", "diffusers" or "kohya"; None: no reader's."""
        for reader in (*self.readers, *self.text):
            for name, _ in _numbered(getattr(reader, wanted), getattr(reader, given), [path]):
                return name
        return None

    def picture(self, tokens: str, count: int, length: int) -> slice:
        """Where the picture's ``count`` tokens lie in a sequence of ``length``."""
        first = length - -(-count // self.pad) * self.pad if tokens == TEXT_PICTURE else 0
        return slice(first, first + count)


def _numbered(comfy: str, wanted: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """(``comfy``, ``wanted``) with each number of a block for which the latter is among the known
    paths, rising."""
    pattern = re.compile(re.escape(wanted).replace(r"\{\}", "([0-9]+)"))
    found = filter(None, map(pattern.fullmatch, known))
    for match in sorted(found, key=lambda match: [int(number) for number in match.groups()]):
        yield comfy.format(*match.groups()), match[0]


def _single(comfy: str, diffusers: str = "", order: str = TEXT_PICTURE) -> Reader:
    return Reader(comfy, diffusers or comfy, order)


DOUBLE_FLUX = Reader("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0")
SINGLE_FLUX = Reader(
    "single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out", TEXT_PICTURE, fused=True
)
FLUX = DOUBLE_FLUX, SINGLE_FLUX
FLUX2 = DOUBLE_FLUX, SINGLE_FLUX._replace(diffusers="single_transformer_blocks.{}.attn.to_out")
CONTEXT_FLUX = (Reader("txt_in", "context_embedder", TEXT),)
POOLED_FLUX = Reader("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", POOLED)
POOLED_HIDREAM = Reader(
    "p_embedder.pooled_embedder.linear_1", "p_embedder.pooled_embedder.linear_1", POOLED
)
CAPTION_HIDREAM = "caption_projection.{}.linear"
TRANSFORMERS = (
    Transformer(
        "z_image", "Z-Image", "NextDiT", "Lumina2",
        (_single("layers.{}.attention.out", "layers.{}.attention.to_out.0"),),
        (Reader("cap_embedder.1", "cap_embedder.1", TEXT),),
        "z-image", ("x_pad_token",), "kohya", pad=32,
    ),
    Transformer(
        "lumina2", "Lumina 2", "NextDiT", "Lumina2",
        (_single("layers.{}.attention.out", "layers.{}.attn.to_out.0"),),
        (Reader("cap_embedder.1", "time_caption_embed.caption_embedder.1", TEXT),),
        "lumina-2", ("!x_pad_token", "!clip_text_pooled_proj"), "kohya",
    ),
    Transformer(
        "flux", "Flux.1", "Flux", "Flux", (POOLED_FLUX, *FLUX), CONTEXT_FLUX,
        "flux-1-dev", ("vector_in.in_layer",), "peft",
    ),
    Transformer(
        "flux2", "Flux.2", "Flux", "Flux2", FLUX2, CONTEXT_FLUX,
        "flux-2-dev", ("double_stream_modulation_img",), "kohya", patch=1,
    ),
    Transformer("chroma", "Chroma", "Chroma", "Chroma", FLUX, CONTEXT_FLUX, "chroma", (), "peft"),
    Transformer(
        "qwen_image", "Qwen-Image", "QwenImageTransformer2DModel", "QwenImage",
        (Reader("transformer_blocks.{}.attn.to_out.0", "transformer_blocks.{}.attn.to_out.0"),),
        (Reader("txt_in", "txt_in", TEXT),), "qwen-image", (), "kohya",
    ),
    Transformer(
        "krea2", "Krea 2", "SingleStreamDiT", "Krea2",
        (_single("blocks.{}.attn.wo", "transformer_blocks.{}.attn.to_out.0"),),
        (Reader("txtmlp.1", "txt_in.linear_1", TEXT),), "krea-2", ("txtfusion",),
    ),
    Transformer(
        "anima", "Anima", "Anima", "Anima",
        (Reader("blocks.{}.cross_attn.output_proj", "transformer_blocks.{}.attn2.to_out.0"),),
        (Reader("blocks.{}.cross_attn.k_proj", "transformer_blocks.{}.attn2.to_k", TEXT),
         Reader("blocks.{}.cross_attn.v_proj", "transformer_blocks.{}.attn2.to_v", TEXT)),
        "anima",
    ),
    Transformer(
        "sd3", "Stable Diffusion 3", "OpenAISignatureMMDITWrapper", "SD3",
        (Reader("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1", POOLED),
         Reader("joint_blocks.{}.x_block.attn.proj", "transformer_blocks.{}.attn.to_out.0")),
        (Reader("context_embedder", "context_embedder", TEXT),),
        "stable-diffusion-v3-medium", (), "peft",
    ),
    Transformer(
        "hidream", "HiDream", "HiDreamImageTransformer2DModel", "HiDream",
        (POOLED_HIDREAM,
         Reader("double_stream_blocks.{}.block.attn1.to_out",
                "double_stream_blocks.{}.block.attn1.to_out"),
         _single("single_stream_blocks.{}.block.attn1.to_out", order=PICTURE_TEXT)),
        (Reader(CAPTION_HIDREAM, CAPTION_HIDREAM, TEXT),), "hidream-i1",
    ),
    Transformer(
        "ernie", "Ernie Image", "ErnieImageModel", "ErnieImage",
        (_single("layers.{}.self_attention.to_out.0", order=PICTURE_TEXT),),
        (Reader("text_proj", "text_proj", TEXT),), "ernie-image", patch=1,
    ),
    Transformer(
        "wan", "Wan", "WanModel", "WAN21",
        (Reader("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),),
        (Reader("text_embedding.0", "condition_embedder.text_embedder.linear_1", TEXT),), "wan-2.1",
    ),
)  # fmt: skip
BY_KEY = {entry.key: entry for entry in TRANSFORMERS}


def transformer_of(network: str, names: Collection[str]) -> Transformer | None:
    """The family of a loaded network, or None.

    Args:
        network: name of its class in ComfyUI.
        names: paths of its modules and parameters.
    """
    for entry in TRANSFORMERS:
        marks = all((mark.lstrip("!") in names) != mark.startswith("!") for mark in entry.marks)
        if entry.network == network and marks:
            return entry
    return None
