"""What a host (ComfyUI, diffusers) offers to the methods. Nothing else crosses that line."""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError
from .families import Family, layers
from .token_positions import CHUNK, EOS_ID, word_positions


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    Attributes:
        context: what cross-attention reads, [B, T, context_dim].
        vectors: further conditioning by name, each [B, ...]; SDXL's pooled text, for one.
        alone: the host takes one prompt a forward: B is 1, for noisy latents of any number.
    """

    context: torch.Tensor
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    alone: bool = False

    @staticmethod
    def cat(texts):
        """Several as one batch; their prompts must have the same number of tokens."""
        names = texts[0].vectors
        vectors = {name: torch.cat([text.vectors[name] for text in texts]) for name in names}
        return Text(torch.cat([text.context for text in texts]), vectors)


def rows(text, index):
    """Some of a batch of texts."""
    vectors = {name: vector[index] for name, vector in text.vectors.items()}
    return Text(text.context[index], vectors)


class Denoiser(Protocol):
    """A loaded U-Net that autograd can work with, for as long as ``Model.borrow_denoiser`` lasts.

    All its weights are frozen. Methods may hook its modules and must unhook them again.
    """

    device: torch.device
    # float32, one a training step (Ho et al. 2020, section 2). None where noise is not added like
    # that; then ``sigmas`` and ``scales`` are there, see ``sampling.euler``.
    alphas_cumprod: torch.Tensor | None
    context_argument: str  # the name under which attn2.forward gets the text

    def module(self, layer) -> torch.nn.Module:
        """The Linear or Conv2d, or the attn2 module, of that diffusers name."""

    def predict_noise(self, x_t, t, text) -> torch.Tensor:
        """Predicted noise [B, 4, h, w] for x_t [B, 4, h, w] at integer steps t [B]."""

    def checkpoint_blocks(self) -> list[torch.nn.Module]:
        """Modules worth recomputing in the backward pass instead of keeping their activations."""


class TextEncoder(Protocol):
    """Text encoders that autograd can work with, while ``Model.borrow_text_encoder`` lasts.

    All their weights are frozen. Methods may hook their modules and must unhook them again. Of
    models with two encoders no words' input embeddings can be had or put in.
    """

    device: torch.device
    width: int  # of a token's input embedding

    def module(self, name) -> torch.nn.Module:
        """The Linear of that diffusers name; see ``families.text_layers``."""

    def vectors(self, words) -> torch.Tensor:
        """Input embeddings of the words' tokens, float32 [k, width], without BOS, EOT, padding."""

    def encode(self, prompt, vectors=None) -> tuple[Text, torch.Tensor]:
        """Encode a prompt, a plain string of one section.

        Args:
            vectors: [k, width]; they are the input embeddings at the k positions that each
                ``PLACEHOLDER`` in the prompt takes, and gradients flow to them.

        Returns:
            the text [1, T, D], as ``Model.encode`` gives it, and the pooled text [1, D]: the last
            layer's state at the first EOT after the final norm, not projected; of two encoders,
            what SDXL reads: the second's, projected.
        """

    def ids_of(self, texts) -> torch.Tensor:
        """Token ids [N, E, 77] of plain strings of one section each, for each of E encoders."""

    def encode_ids(self, ids) -> Text:
        """The text of token ids [N, E, T], as ``Model.encode`` gives it.

        T may be less than 77: CLIP is causal, so what is cut off changes nothing before it. The
        first EOT has to be there still.
        """


class Model(Protocol):
    family: Family
    prediction: str  # "epsilon" or "v"

    def tokenize(self, prompt) -> list:
        """Token ids of a ``Prompt``, a multiple of 77; None where a token is a vector."""

    def encode(self, prompt) -> Text:
        """Encode a ``Prompt``, [1, T, D]."""

    def encode_all(self, texts, length=CHUNK) -> torch.Tensor:
        """Contexts [N, length, D] of plain strings of one section each, in batches.

        Args:
            length: of the 77 tokens these first ones, at least up to each text's first EOT. CLIP
                is causal: fewer tokens are less work and change nothing in those before.
        """

    def text_module(self, name) -> torch.nn.Module:
        """The text encoder's Linear of that diffusers name; it may be hooked, as long as it is
        unhooked again."""

    def sample(self, prompt, seeds, size, steps, guidance) -> torch.Tensor:
        """Latents [len(seeds), 4, size/8, size/8] drawn by the model itself, unit variance."""

    def encode_images(self, images, size) -> torch.Tensor:
        """Latents of pictures [N, H, W, 3], cut to a centred square of ``size`` pixels."""

    def decode(self, latents) -> torch.Tensor:
        """Pictures [N, H, W, 3] in 0..1 of latents [N, 4, h, w] of unit variance."""

    def fingerprint(self) -> str:
        """``fingerprint`` of the loaded weights without any patches."""

    def borrow_denoiser(self):
        """Context manager that gives a ``Denoiser`` and takes it back unchanged."""

    def borrow_text_encoder(self, words=True):
        """Context manager that gives a ``TextEncoder`` and takes it back unchanged.

        Args:
            words: input words are to be learned, which two encoders refuse at once.
        """


def two_encoders_error(family):
    """The refusal to learn words for a model with two text encoders."""
    return ForgetError(
        f"{family.title} has two text encoders, whose words cannot be learned yet: use a Stable "
        "Diffusion 1.x or 2.x model."
    )


def tokenize_with_placeholders(ids_of, prompt, count):
    """One section of token ids, in which each ``PLACEHOLDER`` of a prompt takes some positions.

    Args:
        ids_of: function from a plain text to its ids as the encoder sees it, padding included.
        count: positions that a placeholder takes, 0 for none.

    Returns:
        77 ids, None at the placeholders' positions.

    Raises:
        ForgetError: a placeholder without vectors or the reverse, a vector among the words, or
            more words than a section holds.
    """
    pieces = prompt.split(PLACEHOLDER)
    if (len(pieces) > 1) != (count > 0):
        has, needs = ("", "no vectors") if len(pieces) > 1 else ("no ", "vectors")
        raise ForgetError(
            f"The prompt '{prompt:.60}' has {has}placeholder {PLACEHOLDER}, but {needs} came with "
            "it: give both or neither."
        )
    words = []
    for i, piece in enumerate(pieces):
        ids = ids_of(piece)
        words += [None] * count if i else []
        words += [ids[position] for position in word_positions(ids)]
    empty = ids_of("")
    if len(words) > CHUNK - 2:
        raise ForgetError(
            f"The prompt '{prompt:.60}...' has {len(words)} tokens and one section holds "
            f"{CHUNK - 2}: shorten it."
        )
    return [empty[0], *words, EOS_ID, *[empty[-1]] * (CHUNK - 2 - len(words))]


def cross_attention_names(family):
    """Names of the attn2 modules, in forward order."""
    names = [layer.name for layer in layers(family) if layer.name.endswith(".attn2.to_q")]
    return [name.removesuffix(".to_q") for name in names]


def fingerprint(family, weight_of):
    """A hash that tells one base model from another.

    The same for float16 and float32 copies of it; a copy in bfloat16 has lost bits and counts as
    another base. It covers the first four rows of every cross-attention key and value matrix, in
    float16 and in the order of ``layers``: fine-tunes and merges change all of them, and hashing
    whole matrices would cost a second on SDXL at every use. Where none are known, of every layer.

    Args:
        weight_of: function from a ``Layer`` to its unpatched weight.
    """
    digest = hashlib.sha256()
    for layer in [layer for layer in layers(family) if layer.is_key_or_value] or layers(family):
        rows = weight_of(layer)[:4].detach().to("cpu", torch.float16).contiguous()
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()[:32]
