"""The words that a model reads most like a concept, which suffer first when it is forgotten."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concepts.concept import Concept, Prompt
from ..concepts.keep_list import candidates
from ..models.interface import Model
from .text_embeddings import words_of

Asked = tuple[str, Sequence[str]]  # a concept's name, and words that may be near


def nearest(model: Model, asked: Sequence[Asked], count: int) -> list[dict[str, float]]:
    """For each name the ``count`` of its words most like it, the nearest first.

    Each has the cosine of its encoded text and the name's, from the mean of all; 1 is alike. A
    text that several ask for is encoded once.
    """
    texts = list(dict.fromkeys(text for name, words in asked if words for text in (name, *words)))
    meanings = dict(zip(texts, _meanings(model, texts)))
    found: list[dict[str, float]] = []
    for name, words in asked:
        if not words:
            found.append({})
            continue
        these = torch.stack([meanings[text] for text in (name, *words)])
        these = F.normalize(these - these.mean(0), dim=1)
        best = (these[1:] @ these[0]).topk(min(count, len(words)))
        found.append(
            {words[i]: like for i, like in zip(best.indices.tolist(), best.values.tolist())}
        )
    return found


def _meanings(model: Any, texts: Sequence[str]) -> list[Tensor]:
    """A vector of each text: of CLIP the end, which sums it up. Of a transformer's text, whose
    encoders differ, the mean over tokens; what is the same in all texts counts nothing here."""
    if model.family.known:
        return [rows[-1] for rows in words_of(model, texts)]
    return [model.encode(Prompt(text, "")).context[0].float().cpu().mean(0) for text in texts]


def nearest_kept(model: Model, concepts: Sequence[Concept], count: int) -> list[str]:
    """The ``count`` words of the shipped lists nearest to each concept, without what is
    forgotten; each once."""
    if not count:
        return []
    asked = [(concept.subjects[0], candidates(concepts, concept.kind)) for concept in concepts]
    return list(dict.fromkeys(word for near in nearest(model, asked, count) for word in near))
