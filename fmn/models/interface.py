"""What a host (ComfyUI, diffusers) offers to the methods. Nothing else crosses that line.

Every model offers ``Model``: that is enough to train on its predictions, as ESD does. U-Nets of
``families.FAMILIES``, whose cross-attention and text encoders can be read, offer ``UNetModel``.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..concepts.concept import Prompt
from .adapters import LayerModule
from .families import Family, Layer, UNetFamily
from .token_positions import CHUNK, TokenIds
from .unknown_family import UnknownFamily

SKETCHED = 32  # numbers of a base's sketch, at most
# Noise, or what stands for it, of x_t [B, C, h, w] at the time step t.
NoiseFunction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    Attributes:
        context: what the denoiser reads, [B, T, context_dim].
        vectors: further conditioning by name, each [B, ...]; SDXL's pooled text, for one.
        alone: the host takes one prompt a forward: B is 1, for noisy latents of any number.
    """

    context: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)
    alone: bool = False

    @staticmethod
    def cat(texts: "Sequence[Text]") -> "Text":
        """Several as one batch. Shorter ones are repeated, which changes no attention over them."""
        if len(texts) == 1:
            return texts[0]
        names = texts[0].vectors
        vectors = {name: torch.cat([text.vectors[name] for text in texts]) for name in names}
        length = math.lcm(*(text.context.shape[1] for text in texts))
        contexts = [text.context.repeat(1, length // text.context.shape[1], 1) for text in texts]
        return Text(torch.cat(contexts), vectors)

    def __getitem__(self, index: slice | Tensor) -> "Text":
        """Some of the batch."""
        vectors = {name: vector[index] for name, vector in self.vectors.items()}
        return Text(self.context[index], vectors)


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """How a model adds noise; ``sampling`` has ``DDPMSchedule`` and ``SigmaSchedule``.

    Attributes:
        levels: of each time step [S]: alpha-bar or sigma.
    """

    levels: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t of clean latents [B, C, h, w] at t [B], and what a model should predict for it."""

    @abstractmethod
    def partial_sample(
        self, predict: NoiseFunction, noise: Tensor, steps: int, last: int
    ) -> Tensor:
        """x_t after the first ``last`` of ``steps`` sampling steps from noise [B, C, h, w]."""

    @abstractmethod
    def sample(self, predict: NoiseFunction, noise: Tensor, steps: int, **options: Any) -> Tensor:
        """Clean latents from noise [B, C, h, w]; options of the schedule's sampler."""


class Network(Protocol):
    """What all loaded networks have. Methods may hook modules and must unhook them again."""

    device: torch.device

    @property
    def schedule(self) -> NoiseSchedule: ...

    def module(self, name: str) -> LayerModule:
        """The Linear or Conv2d of a ``Layer.name``; where a network is only watched, it may be
        another class with a quantised weight."""


class Denoiser(Network, Protocol):
    """A loaded network that autograd can work with, while ``Model.borrow_denoiser`` lasts.

    All its weights are frozen.
    """

    def predict_noise(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """Predicted noise [B, C, h, w] for x_t [B, C, h, w] at integer time steps t [B].

        Of flow models, the velocity.
        """

    def checkpoint_blocks(self) -> list[nn.Module]:
        """Modules worth recomputing in the backward pass instead of keeping their activations."""


class UNet(Denoiser, Protocol):
    """A U-Net with DDPM's noise whose cross-attention can be read.

    While it is only watched (``Model.watch``) its predictions have no gradient.
    """

    alphas_cumprod: Tensor  # float32 [S], alpha-bar of Ho et al. 2020, section 2
    context_argument: str  # the name under which attn2.forward gets the text

    def weight(self, name: str) -> Tensor:
        """The weight [out, in] of the Linear of a ``Layer.name``; a quantised one as its layer
        multiplies by it."""

    def cross_attention_modules(self) -> list[nn.Module]:
        """The attn2 modules, ``attention.CrossAttention``, in forward order."""


class TextEncoder(Protocol):
    """Text encoders that autograd can work with, while ``UNetModel.borrow_text_encoder`` lasts.

    All their weights are frozen. Methods may hook their modules and must unhook them again. Input
    embeddings cannot be read or replaced in models with two encoders.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def width(self) -> int:
        """Of a token's input embedding."""

    def module(self, name: str) -> LayerModule:
        """The Linear of that diffusers name; see ``families.text_layers``."""

    def vectors(self, words: str) -> Tensor:
        """Input embeddings of the words' tokens, float32 [k, width], without BOS, EOT, padding."""

    def encode(self, prompt: str, vectors: Tensor | None = None) -> tuple[Text, Tensor]:
        """Encode a prompt, a plain string of one chunk.

        Args:
            vectors: [k, width], the input embeddings at the k positions of each ``PLACEHOLDER`` in
                the prompt; gradients flow to them.

        Returns:
            the text [1, T, D], as ``Model.encode`` gives it, and the pooled text [1, D]: the last
            layer's state at the first EOT after the final norm, not projected; with two encoders,
            what SDXL reads: the second's, projected.
        """

    def ids_of(self, texts: Sequence[str]) -> Tensor:
        """Token ids [N, E, 77] of plain strings of one chunk each, for each of E encoders."""

    def encode_ids(self, ids: Tensor) -> Text:
        """The text of token ids [N, E, T], as ``Model.encode`` gives it.

        T may be less than 77, as long as the first EOT is there: CLIP is causal, so tokens cut off
        change nothing before them.
        """


class Fingerprint(str):
    """32 hex digits that tell one base model from another, to the bit of float16.

    Attributes:
        sketch: numbers that rounding keeps, to tell a copy in another precision from another base.
            The root mean square difference of two is about the relative distance of the weights
            they are of: inner products with random signs keep it (Johnson and Lindenstrauss 1984).
    """

    sketch: tuple[float, ...] = ()


class Watched(Network, Protocol):
    """A transformer that is only run, while ``Model.watch`` lasts.

    Nothing is frozen, copied or converted, so its weights may have any precision, and lie anywhere.
    """

    def predict_each(self, x_t: Tensor, t: int, texts: Sequence[Text]) -> Tensor:
        """Predicted noise or velocity for x_t [B, C, h, w] at the time step t.

        Args:
            texts: B of one prompt each, of any lengths. Those that follow each other share a
                forward where they can; the batch's order is kept.
        """


class Model(Protocol):
    """Any model that predicts noise or velocity from text."""

    prediction: str  # "epsilon", "v" or "flow"

    @property
    def family(self) -> Family: ...

    @property
    def quantised(self) -> bool:
        """Whether weights are no plain floats, so that it can only be watched."""

    def fingerprint(self) -> Fingerprint:
        """``fingerprint`` of the loaded weights without any patches."""

    def encode(self, prompt: Prompt) -> Text:
        """Encode a ``Prompt``, [1, T, D]."""

    def borrow_denoiser(self) -> AbstractContextManager[Denoiser]:
        """The network, ready for autograd while the context lasts and unchanged after it."""

    def watch(self, batch: int = 1, side: int = 8) -> AbstractContextManager[Network]:
        """The network as for sampling ``batch`` latents of that side, to run and to read it, with
        weights of any precision."""


class TransformerModel(Model, Protocol):
    """A diffusion transformer of ``transformers.TRANSFORMERS``."""

    @property
    def family(self) -> UnknownFamily: ...

    def watch(self, batch: int = 1, side: int = 8) -> AbstractContextManager[Watched]:
        """See ``Model.watch``."""


class WordModel(Protocol):
    """What textual inversion needs; ``UNetModel`` has it."""

    @property
    def family(self) -> Family: ...

    def borrow_text_encoder(self) -> AbstractContextManager[TextEncoder]:
        """See ``UNetModel.borrow_text_encoder``."""

    def encode_images(self, images: Tensor, size: int) -> Tensor:
        """See ``UNetModel.encode_images``."""


class UNetModel(Model, Protocol):
    """A U-Net of ``families.FAMILIES`` with its text encoders and its autoencoder."""

    @property
    def family(self) -> UNetFamily: ...

    def borrow_denoiser(self) -> AbstractContextManager[UNet]:
        """The U-Net, ready for autograd while the context lasts and unchanged after it."""

    def watch(self, batch: int = 1, side: int = 8) -> AbstractContextManager[UNet]:
        """See ``Model.watch``."""

    def borrow_text_encoder(self, words: bool = True) -> AbstractContextManager[TextEncoder]:
        """The text encoders, ready for autograd while the context lasts and unchanged after it.

        Args:
            words: input words are to be learned, which models with two encoders refuse at once.
        """

    def tokenize(self, prompt: Prompt) -> TokenIds:
        """Token ids of a ``Prompt``, a multiple of 77; None where a token is a vector."""

    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> Tensor:
        """Contexts [N, length, D] of plain strings of one chunk each, in batches.

        Args:
            length: of the 77 tokens these first ones, at least up to each text's first EOT. CLIP
                is causal: fewer tokens are less work and change nothing in those before.
        """

    def text_module(self, name: str) -> LayerModule:
        """The text encoder's Linear of that diffusers name; hooks on it must be removed again."""

    def sample(
        self, prompt: Prompt, seeds: Iterable[int], size: int, steps: int, guidance: float
    ) -> Tensor:
        """Latents [len(seeds), 4, size/8, size/8] drawn by the host's sampler, unit variance.

        They are to train on: weights that cannot be trained are refused at once.
        """

    def encode_images(self, images: Tensor, size: int) -> Tensor:
        """Latents of pictures [N, H, W, 3], cropped to a centred square of ``size`` pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [N, H, W, 3] in 0..1 of latents [N, 4, h, w] of unit variance."""


def fingerprint(family: Family, weight_of: Callable[[Layer], Tensor]) -> Fingerprint:
    """The marks of a base model: a hash, and a sketch for copies that the hash tells apart.

    The hash is the same for float16 and float32 copies; bfloat16 and 8 bits lose more. It covers
    the first four rows of every cross-attention key and value matrix, in float16 and in the order
    of ``layers``: fine-tunes and merges change all of them, and hashing whole matrices would cost
    a second on SDXL at every use. Of transformers it covers the layers through which text reaches
    the picture, and where nothing is known all layers. The sketch has a number for each of at most
    ``SKETCHED`` of these layers, spread evenly.

    Args:
        weight_of: function from a ``Layer`` to its unpatched weight.
    """
    digest, numbers = hashlib.sha256(), []
    marking = family.marking()
    every = math.ceil(len(marking) / SKETCHED)
    for index, layer in enumerate(marking):
        rows = weight_of(layer)[:4].detach().to("cpu", torch.float16).contiguous().numpy()
        digest.update(rows.tobytes())
        if index % every == 0:
            numbers.append(_projection(torch.from_numpy(rows).float().flatten()))
    mark = Fingerprint(digest.hexdigest()[:32])
    mark.sketch = tuple(numbers)
    return mark


def _projection(values: Tensor) -> float:
    """The inner product of values with fixed signs, over their norm: a scale cancels out, such as
    8-bit files keep beside a weight."""
    stream = torch.tensor(list(hashlib.shake_256(b"fmn").digest(math.ceil(len(values) / 8))))
    signs = 1.0 - 2.0 * ((stream[:, None] >> torch.arange(8)) & 1).flatten()[: len(values)]
    product = values @ signs / values.norm().clamp(min=1e-20)
    return round(float(product.nan_to_num()), 4)
