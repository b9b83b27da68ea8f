"""What Re-read solves on: rows (o, o*) of sentences with and without each concept, and kept rows.

They are what cross-attention reads out of these sentences at the queries of real drawings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...closed_form.output_edit import PartProgress
from ...closed_form.text_embeddings import encode_chunk
from ...errors import ForgetError
from ...linalg import to_float64
from ...models.families import cross_attention_names
from ...models.interface import Text, UNet, UNetModel
from ...models.sampling import seeded_noise
from ...progress import OnStep
from ...sequences import evenly
from .attention_output import CrossAttention, Queries, read_out, record_queries
from .settings import Settings
from .training_images import AT_ONCE, batch_count, image_counts

KEPT_POSITIONS = 4  # at which a kept sentence is read, for each word

SentencePairs = Sequence[tuple[str, str]]  # with the concept, and the same without


def no_difference(text: str, other: str) -> ForgetError:
    """The error for a concept whose sentences are encoded as those without it."""
    return ForgetError(
        f"'{text:.60}' is encoded as '{other:.60}' is: check how the concept is spelled, and that "
        "its anchor is something else."
    )


class ConceptSentences:
    """A concept's sentences beside those without it, and queries of drawings of both.

    Args:
        with_concept, without: queries of drawings of both, [N, S, C] of each layer.
    """

    def __init__(
        self, model: UNetModel, pairs: SentencePairs, with_concept: Queries, without: Queries
    ):
        texts, others = zip(*pairs)
        self.concept, self.other = model.encode_all(texts), model.encode_all(others)  # [n, 77, D]
        if torch.equal(self.concept, self.other):
            raise no_difference(texts[0], others[0])
        self.queries = {
            name: torch.cat([with_concept[name], without[name]], 1) for name in with_concept
        }

    def rows(self, layer: CrossAttention) -> tuple[Tensor, Tensor]:
        """(o, o*): what the layer reads out of both at the same queries, [n S, C] in float64."""
        queries = self.queries[layer.name]
        queries = queries[torch.arange(len(self.concept)) % len(queries)]
        concept, other = (
            to_float64(read_out(layer, queries, contexts)).flatten(0, 1)
            for contexts in (self.concept, self.other)
        )
        return concept, other


class KeptSentences:
    """Kept sentences, each read at a few queries of any drawing.

    Args:
        contexts: [m, 77, D].
    """

    def __init__(self, contexts: Tensor, drawings: Sequence[Queries], settings: Settings):
        self.contexts, self.drawings = contexts, drawings
        self.positions = KEPT_POSITIONS * settings.words_per_prompt
        self.generator = torch.Generator().manual_seed(settings.seed)

    def rows(self, layer: CrossAttention) -> Tensor:
        """What the layer reads out of them, [n, C] in float64."""
        queries = torch.cat([drawing[layer.name].flatten(0, 1) for drawing in self.drawings])
        shape = len(self.contexts), self.positions
        chosen = torch.randint(len(queries), shape, generator=self.generator)
        return to_float64(read_out(layer, queries[chosen], self.contexts)).flatten(0, 1)


class QuerySampler:
    """Draws some texts of lists and gives the queries recorded on the way.

    Args:
        lists: all that will be drawn, to report progress.
        styles: number of the concepts that are styles.
    """

    def __init__(
        self,
        model: UNetModel,
        denoiser: UNet,
        settings: Settings,
        on_step: OnStep,
        lists: Sequence[Sequence[str]],
        concepts: int = 1,
        styles: int = 0,
    ):
        self.model, self.denoiser, self.settings = model, denoiser, settings
        self.side = (settings.size or model.family.resolution) // 8
        self.empty = encode_chunk(model, "")
        batches = sum(-(-sum(map(self._count, some)) // AT_ONCE) for some in self._groups(lists))
        layers = len(cross_attention_names(model.family))
        total = batches + layers + batch_count(settings, concepts, styles)
        self.progress = PartProgress(on_step, total)

    def draw(self, lists: Sequence[Sequence[str]]) -> list[Queries]:
        """Queries by list of texts: of each, layer name -> [drawn, S, C]."""
        return [queries for some in self._groups(lists) for queries in self._draw(some)]

    def _count(self, texts: Sequence[str]) -> int:
        return min(self.settings.images_per_concept, len(texts))

    def _groups(self, lists: Sequence[Sequence[str]]) -> list[Sequence[Sequence[str]]]:
        """Lists of which so little is drawn that a batch holds several, several at a time."""
        size = max(1, AT_ONCE // self.settings.images_per_concept)
        return [lists[first : first + size] for first in range(0, len(lists), size)]

    def _draw(self, lists: Sequence[Sequence[str]]) -> list[Queries]:
        counts = [self._count(texts) for texts in lists]
        chosen = [text for texts, count in zip(lists, counts) for text in evenly(texts, count)]
        seeds = [self.settings.seed + i for count in counts for i in range(count)]
        queries = record_queries(
            self.denoiser, self.model.family, [self.encode(text) for text in chosen], self.empty,
            self.settings, self.side, AT_ONCE, lambda: self.progress(1.0), seeds,
        )  # fmt: skip
        if not all(torch.isfinite(tensor).all() for tensor in queries.values()):
            raise ForgetError(
                "Cross-attention gave numbers that are not finite while prompts were drawn: load "
                "the model in float32 or bfloat16."
            )
        parts = {name: tensor.split(counts) for name, tensor in queries.items()}
        return [{name: part[i] for name, part in parts.items()} for i in range(len(lists))]

    def encode(self, text: str) -> Text:
        """A text of one chunk, [1, 77, D]."""
        return encode_chunk(self.model, text)

    def encode_some(self, texts: Sequence[str]) -> Text:
        """Texts as one batch, at most as many as adversarial training draws of kept ones."""
        count = min(len(texts), max(image_counts(self.settings)))
        return Text.cat([self.encode(text) for text in evenly(texts, count)])

    def noise(self, count: int) -> Tensor:
        """Pure noise [count, 4, side, side] of seeds from the settings' on, on the CPU."""
        return seeded_noise(range(self.settings.seed, self.settings.seed + count), self.side)
