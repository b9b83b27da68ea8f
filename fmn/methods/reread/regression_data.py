"""A concept's sentences as cross-attention reads them, at queries of real drawings.

What Re-read solves on: rows (o, o*) of sentences with and without each concept, and rows of kept
sentences; see ``methods/reread.py``.
"""

import torch

from ...closed_form.output_edit import Progress
from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...linalg import exact
from ...models.interface import Text, cross_attention_names
from ...models.sampling import seeded_noise
from ...models.token_positions import CHUNK
from .attention_output import read_out, record_queries
from .training_images import AT_ONCE, batch_count, image_counts

KEPT_PLACES = 4  # at which a kept sentence is read, for each word


class Reading:
    """A concept's sentences beside those without it, and queries of drawings of both.

    Attributes:
        concept, other: contexts [n, 77, D]. queries: layer name -> [drawn, S, C].
    """

    def __init__(self, concept, other, queries):
        self.concept, self.other, self.queries = concept, other, queries

    @staticmethod
    def of(model, pairs, first, second):
        """
        Args:
            pairs: [(text with the concept, the same without)].
            first, second: queries of drawings of both.
        """
        texts, others = zip(*pairs)
        concept, other = model.encode_all(texts), model.encode_all(others)
        if torch.equal(concept, other):
            raise ForgetError(
                f"'{texts[0]:.60}' is encoded as '{others[0]:.60}' is: check how the concept is "
                "spelled, and that its anchor is something else."
            )
        queries = {name: torch.cat([first[name], second[name]], 1) for name in first}
        return Reading(concept, other, queries)

    def rows(self, layer):
        """What the layer reads out of both, at the same places: (o, o*) of [n S, C], float64."""
        queries = self.queries[layer.name]
        queries = queries[torch.arange(len(self.concept)) % len(queries)]
        return tuple(
            exact(read_out(layer, queries, contexts)).flatten(0, 1)
            for contexts in (self.concept, self.other)
        )


class Kept:
    """Kept sentences, each read at a few places of any drawing."""

    def __init__(self, contexts, drawings, settings):
        self.contexts, self.drawings = contexts, drawings
        self.places = KEPT_PLACES * settings.words_per_prompt
        self.generator = torch.Generator().manual_seed(settings.seed)

    def rows(self, layer):
        """What the layer reads out of them, [n, C] in float64."""
        queries = torch.cat([each[layer.name].flatten(0, 1) for each in self.drawings])
        shape = len(self.contexts), self.places
        chosen = torch.randint(len(queries), shape, generator=self.generator)
        return exact(read_out(layer, queries[chosen], self.contexts)).flatten(0, 1)


class Drawings:
    """Draws some of a list's texts and gives the queries recorded on the way."""

    @staticmethod
    def sides(spoken):
        """The lists of texts to draw of concepts' pairs: with the concept, and without, in turn."""
        return [[pair[side] for pair in pairs] for pairs in spoken for side in (0, 1)]

    def __init__(self, model, denoiser, settings, on_step, spoken, kept, styles=0):
        self.model, self.denoiser, self.settings = model, denoiser, settings
        self.side = (settings.size or model.family.resolution) // 8
        self.empty = self.encoded_one("")
        drawn = [
            min(settings.images_per_concept, len(texts)) for texts in (*self.sides(spoken), kept)
        ]
        batches = sum(-(-sum(some) // AT_ONCE) for some in self._shared(drawn))
        layers = len(cross_attention_names(model.family))
        total = batches + layers + batch_count(settings, len(spoken), styles)
        self.progress = Progress(on_step, total)

    def __call__(self, *lists):
        """Queries by list of texts: of each, layer name -> [drawn, S, C]."""
        return [queries for some in self._shared(lists) for queries in self._drawn(some)]

    def _shared(self, lists):
        """Lists of which so little is drawn that a batch holds several, several at a time."""
        share = max(1, AT_ONCE // self.settings.images_per_concept)
        return [lists[first : first + share] for first in range(0, len(lists), share)]

    def _drawn(self, lists):
        counts = [min(self.settings.images_per_concept, len(texts)) for texts in lists]
        texts = [
            self.encoded_one(texts[i * len(texts) // count])
            for texts, count in zip(lists, counts)
            for i in range(count)
        ]
        numbers = [self.settings.seed + i for count in counts for i in range(count)]
        queries = record_queries(
            self.denoiser, self.model.family, texts, self.empty, self.settings, self.side,
            AT_ONCE, lambda: self.progress(1.0), numbers,
        )  # fmt: skip
        if not all(torch.isfinite(each).all() for each in queries.values()):
            raise ForgetError(
                "Cross-attention gave numbers that are not finite while prompts were drawn: load "
                "the model in float32 or bfloat16."
            )
        parts = {name: each.split(counts) for name, each in queries.items()}
        return [{name: own[i] for name, own in parts.items()} for i in range(len(lists))]

    def encoded(self, texts):
        """Texts as one batch, at most as many of them as hardening draws of what is kept."""
        count = min(len(texts), max(image_counts(self.settings)))
        return Text.cat([self.encoded_one(texts[i * len(texts) // count]) for i in range(count)])

    def noise(self, count):
        """Pure noise [count, 4, side, side] of seeds from the settings' on, on the CPU."""
        return seeded_noise(range(self.settings.seed, self.settings.seed + count), self.side)

    def encoded_one(self, text):
        found = self.model.encode(Prompt(text, text))
        if found.context.shape[1] != CHUNK:
            raise ForgetError(f"'{text:.60}...' is too long: shorten it to 75 tokens.")
        return found
