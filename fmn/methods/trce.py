"""TRCE, first stage (Chen et al. 2025, arXiv 2503.07389): a closed form on the end of the text.

The embedding of the first end-of-text token sums up a prompt, also what it says by other words. So
that of many prompts with the concept is read as that of the same prompts with the anchor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..closed_form.input_edit import (
    damping_setting,
    erase_setting,
    input_patch,
    preserve_setting,
    rank_setting,
    uce,
)
from ..closed_form.text_embeddings import end_pairs, keep_list_setting, kept_contexts
from ..concepts.concept import Concept
from ..concepts.keep_list import keep_for
from ..concepts.prompt_templates import sentences
from ..models.interface import UNetModel
from ..patches.patch import ForgetPatch
from ..progress import OnStep, ignore
from ..settings import Settings as Base
from ..settings import advanced, setting

TITLE = "TRCE (closed form)"
REVISION = 1
ABOUT = (
    "The closed form of TRCE (arXiv 2503.07389): makes the end-of-text token of many prompts with "
    "the concept read as if they spoke of the anchor."
)


@dataclass(frozen=True)
class Settings(Base, method="trce"):
    prompts: int = setting(
        60,
        "Sentences with each name of the concept, from a fixed list. More cover more wordings and "
        "take longer to encode.",
        limits=(1, 180),
    )
    ends: str = advanced(
        "first",
        "Which end tokens are edited. first: the first end-of-text. all: also the padding behind.",
        choices=("first", "all"),
    )
    erase: float = erase_setting()
    preserve: float = preserve_setting(0.01)
    damping: float = damping_setting(0.1)
    keep_list: str = keep_list_setting()
    rank: int = rank_setting(8)


PRESETS = {"trce": Settings(), "trce-released": Settings(prompts=15, damping=1e-3, rank=0)}


@torch.no_grad()
def run(
    model: UNetModel,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``.

    TRCE's objective of its first stage is UCE's with c and c* the EOT embeddings of prompts with
    the concept and with its anchor, as means over N prompts and M kept ones:
    e/N sum |W' c - W c*|^2 + p/M sum |W' k - W k|^2 + l |W' - W|^2.
    """
    texts = [pair for concept in concepts for pair in sentences(concept, settings.prompts)]
    pairs = end_pairs(model, texts, settings.ends)
    words = ("", *keep_for(concepts, keep, settings.keep_list)) if settings.preserve else ()
    kept = kept_contexts(model, words, "all")
    weights = settings.erase / len(texts), settings.preserve / max(len(words), 1)
    edit = uce(*pairs, kept, *weights, settings.damping)
    return input_patch(model, concepts, settings, pairs, lambda denoiser: edit, on_step)
