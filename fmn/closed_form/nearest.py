"""The words that a model reads most like a concept, which suffer first when it is forgotten."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..concepts.concept import Concept
from ..concepts.keep_list import candidates
from .text_embeddings import EncodesText, words_of


def nearest(model: EncodesText, name: str, words: Sequence[str], count: int) -> dict[str, float]:
    """The ``count`` words most like a name, the nearest first.

    Each has the cosine of its encoded text's end and the name's, from the mean of all; 1 is alike.
    """
    if not words:
        return {}
    ends = torch.stack([rows[-1] for rows in words_of(model, [name, *words])])
    ends = F.normalize(ends - ends.mean(0), dim=1)
    best = (ends[1:] @ ends[0]).topk(min(count, len(words)))
    return {words[i]: value for i, value in zip(best.indices.tolist(), best.values.tolist())}


def nearest_kept(model: EncodesText, concepts: Sequence[Concept], count: int) -> list[str]:
    """The ``count`` words of the shipped lists nearest to each concept, without what is
    forgotten; each once."""
    near: dict[str, None] = {}
    for concept in concepts if count else ():
        words = candidates(concepts, concept.kind)
        near |= dict.fromkeys(nearest(model, concept.subjects[0], words, count))
    return list(near)
