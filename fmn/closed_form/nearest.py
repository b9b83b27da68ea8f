"""The words that a model reads most like a concept, which suffer first when it is forgotten."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..concepts.concept import Concept
from ..concepts.keep_list import candidates
from .text_embeddings import EncodesText, words_of

Asked = tuple[str, Sequence[str]]  # a concept's name, and words that may be near


def nearest(model: EncodesText, asked: Sequence[Asked], count: int) -> list[dict[str, float]]:
    """For each name the ``count`` of its words most like it, the nearest first.

    Each has the cosine of its encoded text's end and the name's, from the mean of all; 1 is alike.
    A text that several ask for is encoded once.
    """
    texts = list(dict.fromkeys(text for name, words in asked if words for text in (name, *words)))
    ends = {text: rows[-1] for text, rows in zip(texts, words_of(model, texts))}
    found: list[dict[str, float]] = []
    for name, words in asked:
        if not words:
            found.append({})
            continue
        these = torch.stack([ends[text] for text in (name, *words)])
        these = F.normalize(these - these.mean(0), dim=1)
        best = (these[1:] @ these[0]).topk(min(count, len(words)))
        found.append(
            {words[i]: like for i, like in zip(best.indices.tolist(), best.values.tolist())}
        )
    return found


def nearest_kept(model: EncodesText, concepts: Sequence[Concept], count: int) -> list[str]:
    """The ``count`` words of the shipped lists nearest to each concept, without what is
    forgotten; each once."""
    if not count:
        return []
    asked = [(concept.subjects[0], candidates(concepts, concept.kind)) for concept in concepts]
    return list(dict.fromkeys(word for near in nearest(model, asked, count) for word in near))
