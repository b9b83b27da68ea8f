"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), a closed form.

Keys and values of cross-attention are solved anew so that the concept's tokens are read as its
anchor's, and kept ones as before. Here as an exact low rank; see ``fmn.closed_form.input_edit``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..closed_form.input_edit import (
    damping_setting,
    debiased_anchors,
    erase_setting,
    input_patch,
    preserve_setting,
    rank_setting,
    uce,
)
from ..closed_form.text_embeddings import (
    Pairs,
    concept_pairs,
    expand_setting,
    expanded_templates,
    keep_list_setting,
    keep_tokens_setting,
    kept_contexts,
    tokens_setting,
)
from ..concepts.concept import Concept
from ..concepts.keep_list import keep_for
from ..errors import ForgetError
from ..models.interface import UNetModel
from ..patches.patch import ForgetPatch
from ..progress import OnStep, ignore
from ..settings import Settings as Base
from ..settings import setting

TITLE = "UCE"
REVISION = 1
ABOUT = (
    "Unified Concept Editing (arXiv 2308.14761): a closed form, done in a moment, that makes "
    "cross-attention read the concept's words as its anchor's."
)


def read_attributes(text: str) -> list[tuple[str, float]]:
    """[(attribute, weight)] of 'woman 0.3, man -0.3'.

    Raises:
        ForgetError: an entry is no words with a finite number behind them.
    """
    attributes = []
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
        attributes.append((name.strip(), weight))
    return attributes


@dataclass(frozen=True)
class Settings(Base, method="uce"):
    erase: float = erase_setting()
    preserve: float = preserve_setting()
    damping: float = damping_setting(0.5)
    tokens: str = tokens_setting()
    expand: bool = expand_setting()
    attributes: str = setting(
        "",
        "Not empty: nothing is forgotten; the concept is shifted towards or away from these "
        "attributes, each with a weight, such as 'woman 0.3, man -0.3'.",
    )
    keep_list: str = keep_list_setting()
    keep_tokens: str = keep_tokens_setting()
    rank: int = rank_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        read_attributes(self.attributes)


PRESETS = {
    "uce": Settings(),
    "uce-2023": Settings(tokens="from-last", keep_tokens="all", preserve=0.1),
}


@torch.no_grad()
def run(
    model: UNetModel,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``."""
    attributes = read_attributes(settings.attributes)
    anchored = next((concept for concept in concepts if concept.anchor), None)
    if attributes and anchored:
        raise ForgetError(
            f"'{anchored.name}' has an anchor, and attributes are set: use one of the two."
        )
    pairs, kept = uce_rows(model, concepts, settings, keep)
    if attributes:
        names, weights = zip(*attributes)
        anchors = debiased_anchors(pairs.targets, kept_contexts(model, names), weights)
        pairs = Pairs(pairs.targets, anchors)
    edit = uce(*pairs, kept, settings.erase, settings.preserve, settings.damping)
    return input_patch(model, concepts, settings, pairs, lambda denoiser: edit, on_step)


def uce_rows(
    model: UNetModel, concepts: Sequence[Concept], settings: Any, keep: Sequence[str]
) -> tuple[Pairs, Tensor]:
    """The rows c with c* to edit, and the rows k to keep, [m, D].

    Args:
        settings: of UCE or RECE.
    """
    pairs = concept_pairs(
        model,
        concepts,
        settings.tokens,
        lambda concept: expanded_templates(concept) * settings.expand,
    )
    words = keep_for(concepts, keep, settings.keep_list) if settings.preserve else ()
    if words and settings.keep_tokens == "all":
        words = ("", *words)
    return Pairs.cat(pairs), kept_contexts(model, words, settings.keep_tokens)
