"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), a closed form.

Keys and values of cross-attention are solved anew so that the concept's tokens are read as its
anchor's, and kept ones as before. Here as an exact low rank; see ``fmn.closed_form.input_edit``.
"""

import math
from dataclasses import dataclass

import torch

from ..closed_form.input_edit import (
    damping,
    debias,
    erase,
    input_patch,
    preserve,
    rank_setting,
    uce,
)
from ..closed_form.text_embeddings import (
    Pairs,
    concept_pairs,
    keep_list_setting,
    keep_tokens_setting,
    kept_contexts,
    templates_of,
    tokens_setting,
)
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..settings import Settings as Base
from ..settings import setting

TITLE = "UCE"
ABOUT = (
    "Unified Concept Editing (arXiv 2308.14761): a closed form, done in a moment, that makes "
    "cross-attention read the concept's words as its anchor's."
)


def read_attributes(text):
    """[(attribute, weight)] of 'woman 0.3, man -0.3'.

    Raises:
        ForgetError: an entry is no words with a finite number behind them.
    """
    found = []
    for entry in (entry.strip() for entry in text.split(",") if text.strip()):
        name, _, number = entry.rpartition(" ")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name.strip() or not math.isfinite(weight):
            raise ForgetError(
                f"The attribute '{entry:.60}' has to be words and a number: write for example "
                "'woman 0.3, man -0.3'."
            )
        found.append((name.strip(), weight))
    return found


@dataclass(frozen=True)
class Settings(Base, method="uce"):
    erase: float = erase()
    preserve: float = preserve()
    damping: float = damping(0.5)
    tokens: str = tokens_setting()
    expand: bool = setting(
        False,
        "On: also edit five templates around each name, such as 'photo of NAME'.",
        advanced=True,
    )
    attributes: str = setting(
        "",
        "Not empty: nothing is forgotten; the concept is shifted towards or away from these "
        "attributes, each with a weight, such as 'woman 0.3, man -0.3'.",
    )
    keep_list: str = keep_list_setting()
    keep_tokens: str = keep_tokens_setting()
    rank: int = rank_setting()

    def __post_init__(self):
        super().__post_init__()
        read_attributes(self.attributes)


PRESETS = {
    "uce": Settings(),
    "uce-2023": Settings(tokens="from-last", keep_tokens="all", preserve=0.1),
}


@torch.no_grad()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch; see ``methods.forget``."""
    attributes = read_attributes(settings.attributes)
    anchored = next((concept for concept in concepts if concept.anchor), None)
    if attributes and anchored:
        raise ForgetError(
            f"'{anchored.name}' has an anchor, and attributes are set: use one of the two."
        )
    pairs, kept = rows_of(model, concepts, settings, keep)
    weighted = settings.erase, settings.preserve, settings.damping
    if not attributes:
        edit = uce(*pairs, kept, *weighted)
    else:
        names, weights = zip(*attributes)
        edit, pairs = debias(pairs.targets, kept_contexts(model, names), weights, kept, *weighted)
    return input_patch(model, concepts, settings, pairs, lambda denoiser: edit, on_step=on_step)


def rows_of(model, concepts, settings, keep):
    """The ``Pairs`` to edit and the rows to keep."""
    pairs = concept_pairs(
        model, concepts, settings.tokens, lambda concept: templates_of(concept) * settings.expand
    )
    words = keep_for(concepts, keep, settings.keep_list) if settings.preserve else ()
    if words and settings.keep_tokens == "all":
        words = ("", *words)
    return Pairs.cat(pairs), kept_contexts(model, words, settings.keep_tokens)
