"""What the text encoders of all hosts share: CLIP, on chunks of 77 tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError
from .families import Family
from .interface import Text
from .token_positions import CHUNK, tokenize_with_placeholders, word_positions

ENCODED_AT_ONCE = 32 * CHUNK  # tokens


def in_batches(texts: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    """As many texts at a time as are encoded at once, with ``length`` tokens each."""
    count = max(1, ENCODED_AT_ONCE // length)
    for i in range(0, len(texts), count):
        yield texts[i : i + count]


def refuse_words(family: Family) -> None:
    """Refuse to learn words for a model with two text encoders.

    Raises:
        ForgetError: the family has two.
    """
    if len(family.texts) > 1:
        raise ForgetError(
            f"{family.title} has two text encoders, whose words cannot be learned yet: use a "
            "Stable Diffusion 1.x or 2.x model."
        )


def check_one_chunk(text: str, chunks: int) -> None:
    """Refuse a text that takes more than one chunk."""
    if chunks > 1:
        raise ForgetError(f"'{text:.60}...' is too long: shorten it to 75 tokens.")


class CLIPTextEncoder(ABC):
    """Base of the hosts' ``interface.TextEncoder``.

    Attributes:
        pair: the family has two encoders, as SDXL.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.pair = family, len(family.texts) > 1

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The first encoder's input embeddings."""

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Token ids of a plain string, a multiple of 77."""

    @abstractmethod
    def _encode_pair(self, prompt: str) -> Text:
        """A prompt, as both encoders give it."""

    @abstractmethod
    def _encode_chunk(self, ids: list[int | None], vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """States [1, 77, D] and pooled text [1, D] of ids, with a row of vectors for each None."""

    @abstractmethod
    def _states(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """States [N, T, D] that the U-Net reads and pooled text of each encoder, for ids [N, E, T].

        The pooled text is used of the second of two encoders alone.
        """

    @property
    def width(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def vectors(self, words: str) -> Tensor:
        refuse_words(self.family)
        ids = self._ids(words)
        rows = [ids[position] for position in word_positions(ids)]
        return self.embedding.weight[rows].detach().float().clone()

    def encode(self, prompt: str, vectors: Tensor | None = None) -> tuple[Text, Tensor]:
        if vectors is not None:
            refuse_words(self.family)
        count = 0 if vectors is None else len(vectors)
        ids = tokenize_with_placeholders(self._ids, prompt, count)
        if self.pair:
            text = self._encode_pair(prompt)
            return text, text.vectors["pooled"]
        if vectors is not None:
            vectors = vectors.repeat(prompt.count(PLACEHOLDER), 1)
        context, pooled = self._encode_chunk(ids, vectors)
        return Text(context.float()), pooled.float()

    def encode_ids(self, ids: Tensor) -> Text:
        states = self._states(ids)
        context, pooled = torch.cat([state for state, _ in states], -1), states[-1][1]
        return Text(context.float(), {"pooled": pooled.float()} if self.pair else {})
