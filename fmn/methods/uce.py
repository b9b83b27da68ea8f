"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), a closed form.

Keys and values of cross-attention are solved anew so that the concept's tokens are read as its
anchor's, and kept ones as before. Here as an exact low rank; see ``fmn.closed_form``.
"""

from dataclasses import dataclass

import torch

from ..closed_form import input_patch, residual, uce
from ..contexts import ART_TEMPLATES, OBJECT_TEMPLATES, TOKENS, Pairs, concept_pairs, kept_contexts
from ..fitting import autograd
from ..keep import LISTS, keep_for
from ..settings import Settings as Base
from ..settings import setting

TITLE = "UCE"
ABOUT = (
    "Unified Concept Editing (arXiv 2308.14761): a closed form, done in a moment, that makes "
    "cross-attention read the concept's words as its anchor's."
)


@dataclass(frozen=True)
class Settings(Base):
    erase: float = setting(
        1.0,
        "Weight of what is forgotten. 0: nothing happens. Above 1: the concept goes more surely, "
        "and neighbours with it.",
        low=0.0,
        high=1000.0,
        step=0.01,
    )
    preserve: float = setting(
        1.0,
        "Weight of what is kept. 0: no keep-list. Higher: what is listed changes less.",
        low=0.0,
        high=1000.0,
        step=0.01,
    )
    damping: float = setting(
        0.5,
        "Weight of leaving everything as it is (lambda). Small: a stronger edit. Large: none.",
        low=1e-6,
        high=1e6,
        step=0.01,
    )
    tokens: str = setting(
        "last",
        "Which of the concept's tokens are edited. last: its last one, as in the current code. "
        "from-last: that one, the end of the text and its padding, as in the code of 2023. "
        "subject: all of its words. all: every position.",
        choices=TOKENS,
    )
    expand: bool = setting(
        False, "On: also edit five templates around each name, such as 'photo of NAME'."
    )
    keep_list: str = setting(
        "auto",
        "Shipped list of what to keep, beside what is connected. auto: by the concept's kind.",
        choices=("auto", *LISTS),
    )
    keep_tokens: str = setting(
        "last",
        "Which tokens of kept words stay. last: the last one. all: every position, padding too.",
        choices=("last", "all"),
    )
    rank: int = setting(
        0, "Largest rank of a layer's change. 0: all of it, nothing is cut.", low=0, high=768
    )


PRESETS = {
    "uce": Settings(),
    "uce-2023": Settings(tokens="from-last", keep_tokens="all", preserve=0.1),
}


def templates_of(concept):
    """The templates that ``expand`` adds for a concept."""
    return ART_TEMPLATES if concept.kind == "style" else OBJECT_TEMPLATES


@autograd()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch; see ``methods.forget``."""
    with torch.no_grad():
        pairs = Pairs.cat(
            [
                concept_pairs(
                    model, concept, settings.tokens, templates_of(concept) * settings.expand
                )
                for concept in concepts
            ]
        )
        words = keep_for(concepts, keep, settings.keep_list) if settings.preserve else ()
        kept = kept_contexts(model, words, settings.keep_tokens)

    def edit_of(weights):
        weighted = settings.erase, settings.preserve, settings.damping
        edit = uce(pairs.targets, pairs.anchors, kept, *weighted)
        nothing = edit._replace(left=torch.zeros_like(edit.left))
        losses = [residual(weights, each, *pairs) for each in (nothing, edit)]
        return edit, losses

    return input_patch(model, concepts, settings, edit_of, rank=settings.rank)
