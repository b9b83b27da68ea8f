"""The words that a model reads most like a concept, which suffer first when it is forgotten."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..concepts.concept import Concept
from ..concepts.keep_list import candidates
from .text_embeddings import EncodesText, words_of


def likeness(model: EncodesText, name: str, words: Sequence[str]) -> list[float]:
    """The cosine of each word's encoded text and the name's, from the mean of all; 1 is alike."""
    if not words:
        return []
    ends = torch.stack([rows[-1] for rows in words_of(model, [name, *words])])
    ends = F.normalize(ends - ends.mean(0), dim=1)
    return (ends[1:] @ ends[0]).tolist()


def nearest(model: EncodesText, name: str, words: Sequence[str], count: int) -> dict[str, float]:
    """The ``count`` words most like a name, the nearest first, each with its ``likeness``."""
    found = zip(words, likeness(model, name, words))
    return dict(sorted(found, key=lambda pair: -pair[1])[:count])


def nearest_kept(model: EncodesText, concepts: Sequence[Concept], count: int) -> list[str]:
    """The ``count`` words of the shipped lists nearest to each concept, without what is
    forgotten; each once."""
    near: dict[str, None] = {}
    for concept in concepts if count else ():
        words = candidates(concepts, concept.kind)
        near |= dict.fromkeys(nearest(model, concept.subjects[0], words, count))
    return list(near)
