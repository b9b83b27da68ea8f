"""What a host (ComfyUI, diffusers) offers to the methods. Nothing else crosses that line."""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .families import Family, layers


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    Attributes:
        context: what cross-attention reads, [B, T, context_dim].
        vectors: further conditioning by name, each [B, ...]; SDXL's pooled text, for one.
    """

    context: torch.Tensor
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(texts):
        """Several as one batch; their prompts must have the same number of tokens."""
        names = texts[0].vectors
        vectors = {name: torch.cat([text.vectors[name] for text in texts]) for name in names}
        return Text(torch.cat([text.context for text in texts]), vectors)


class Borrowed(Protocol):
    """A loaded U-Net that autograd can work with, for as long as ``Model.borrow`` lasts.

    All its weights are frozen. Methods may hook its modules and must unhook them again.
    """

    device: torch.device
    alphas_cumprod: torch.Tensor  # float32, one a training step (Ho et al. 2020, section 2)
    context_argument: str  # the name under which attn2.forward gets the text

    def module(self, layer) -> torch.nn.Module:
        """The Linear or Conv2d, or the attn2 module, of that diffusers name."""

    def denoise(self, x_t, t, text) -> torch.Tensor:
        """Predicted noise [B, 4, h, w] for x_t [B, 4, h, w] at integer steps t [B]."""

    def checkpoint_blocks(self) -> list[torch.nn.Module]:
        """Modules worth recomputing in the backward pass instead of keeping their activations."""


class Model(Protocol):
    family: Family
    prediction: str  # "epsilon" or "v"

    def tokenize(self, prompt) -> list:
        """Token ids of a ``Prompt``, a multiple of 77; None where a token is a vector."""

    def encode(self, prompt) -> Text:
        """Encode a ``Prompt``, [1, T, D]."""

    def sample(self, prompt, seeds, size, steps, guidance) -> torch.Tensor:
        """Latents [len(seeds), 4, size/8, size/8] drawn by the model itself, unit variance."""

    def encode_images(self, images, size) -> torch.Tensor:
        """Latents of pictures [N, H, W, 3], cut to a centred square of ``size`` pixels."""

    def fingerprint(self) -> str:
        """``fingerprint`` of the loaded weights without any patches."""

    def borrow(self):
        """Context manager that gives a ``Borrowed`` and takes it back unchanged."""


def cross_attention_names(family):
    """Names of the attn2 modules, in forward order."""
    names = [layer.name for layer in layers(family) if layer.name.endswith(".attn2.to_q")]
    return [name.removesuffix(".to_q") for name in names]


def fingerprint(family, weight_of):
    """A hash that tells one base model from another.

    The same for float16 and float32 copies of it; a copy in bfloat16 has lost bits and counts as
    another base. It covers the first four rows of every cross-attention key and value matrix, in
    float16 and in the order of ``layers``: fine-tunes and merges change all of them, and hashing
    whole matrices would cost a second on SDXL at every use.

    Args:
        weight_of: function from a ``Layer`` to its unpatched weight.
    """
    digest = hashlib.sha256()
    for layer in layers(family):
        if layer.is_key_or_value:
            rows = weight_of(layer)[:4].detach().to("cpu", torch.float16).contiguous()
            digest.update(rows.numpy().tobytes())
    return digest.hexdigest()[:32]
