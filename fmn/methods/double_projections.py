"""Double Projections (Zhang et al. 2026, arXiv 2604.10032): closed form, off the kept span.

First projection: the concept's embedding c onto the span of safe words gives its proxy c*. Second:
W c becomes W c* by a change that gives nothing for any kept embedding.
"""

from dataclasses import dataclass

import torch

from ..closed_form.input_edit import InputEdit, input_patch, rank_setting
from ..closed_form.text_embeddings import (
    Pairs,
    concept_pairs,
    keep_list_setting,
    kept_contexts,
    tokens_setting,
)
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..linalg import main_directions, off
from ..settings import Settings as Base
from ..settings import setting

TITLE = "Double Projections"
ABOUT = (
    "Double Projections (arXiv 2604.10032): a closed form that replaces the concept by its "
    "nearest mix of kept words, by a change that gives nothing for the last tokens of those "
    "words."
)
SMALLEST = 1e-6  # of an embedding's square norm; less outside the kept span is no direction


@dataclass(frozen=True)
class Settings(Base, method="double_projections"):
    directions: int = setting(
        0,
        "How many main directions of the kept words are protected exactly (top-k SVD). More: less "
        "harm and a weaker hold on the concept. 0: all of them, at most half of a token's width.",
        low=0,
        high=2048,
    )
    proxy: int = setting(
        4,
        "Main directions of the kept words whose mix replaces a concept without an anchor. Few: "
        "something vague. Many: what resembles the concept most, so less is forgotten. 0: all "
        "protected ones, as published.",
        low=0,
        high=2048,
    )
    tokens: str = tokens_setting()
    keep_list: str = keep_list_setting()
    rank: int = rank_setting()


PRESETS = {
    "double-projections": Settings(),
    "double-projections-published": Settings(proxy=0),
}


@torch.no_grad()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch; see ``methods.forget``."""
    # Of the empty prompt this keeps BOS, which begins every prompt.
    own = kept_contexts(model, ("", *keep_for(concepts, keep, "none")))
    words = ("", *keep_for(concepts, keep, settings.keep_list))
    kept = kept_contexts(model, words)
    count = settings.directions or model.family.context_dim // 2
    basis = protected(own, kept, count)
    safe = main_directions(kept, settings.proxy or count)
    found = concept_pairs(model, concepts, settings.tokens)
    pairs = Pairs.cat([_anchored(each, own, basis, safe) for each, own in zip(concepts, found)])
    edit = double_projections(*pairs, basis)
    return input_patch(model, concepts, settings, pairs, lambda denoiser: edit, on_step=on_step)


def protected(own, kept, count):
    """Basis [D, k] of at most ``count`` directions: of the user's own rows first, then the main
    ones of the others."""
    first = main_directions(own, count)
    # What is left of rows inside the first directions is rounding, and no direction.
    rest = off(kept, first)
    rest = rest[rest.square().sum(1) > SMALLEST * kept.square().sum(1)]
    return torch.cat([first, main_directions(rest, count - first.shape[1])], 1)


def double_projections(targets, anchors, basis):
    """dW = W (c* - c) x^T U^T / |x|^2 with x = U^T c, for several c at once.

    U is a basis of what is orthogonal to the kept span, so U x = P c with P = U U^T. Several
    concepts are solved jointly: dW = W (C* - C) (C^T P C)^+ C^T P maps each exactly, where edits
    made one after the other would undo each other. For one concept it is the formula above.

    Args:
        targets, anchors: rows c and c*, [n, D].
        basis: of the kept span, [D, k].
    """
    outside = off(targets, basis)
    inverse = torch.linalg.pinv(outside @ outside.mT, hermitian=True, rtol=SMALLEST)
    return InputEdit((anchors - targets).mT, inverse @ outside)


def _anchored(concept, pairs, basis, safe):
    """A concept's tokens with its anchor's, or with their projection on the safe span."""
    outside = off(pairs.targets, basis)
    if (outside.square().sum(1) < SMALLEST * pairs.targets.square().sum(1)).all():
        raise ForgetError(
            f"'{concept.name}' is a mix of the kept words, so nothing can change it without them: "
            "protect fewer directions, or keep fewer words."
        )
    if concept.anchor:
        return pairs
    return Pairs(pairs.targets, pairs.targets - off(pairs.targets, safe))
