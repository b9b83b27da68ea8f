"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), a closed form.

Keys and values of cross-attention are solved anew so that the concept's tokens are read as its
anchor's, and kept ones as before. Here as an exact low rank; see ``fmn.closed_form.input_edit``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..closed_form.input_edit import debiased_anchors, input_patch, uce
from ..closed_form.text_embeddings import Pairs, expanded_pairs, kept_contexts
from ..errors import ForgetError
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import setting
from . import shared_settings as shared

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
    erase: float = shared.erase()
    preserve: float = shared.preserve()
    damping: float = shared.damping(default=0.5)
    tokens: str = shared.tokens()
    expand: bool = shared.expand()
    attributes: str = setting(
        "",
        "Not empty: nothing is forgotten; the concept is shifted towards or away from these "
        "attributes, each with a weight, such as 'woman 0.3, man -0.3'.",
    )
    keep_list: str = shared.keep_list()
    keep_tokens: str = shared.keep_tokens()
    rank: int = shared.solved_rank()

    def __post_init__(self) -> None:
        super().__post_init__()
        read_attributes(self.attributes)


PRESETS = {
    "uce": Settings(),
    "uce-2023": Settings(tokens="from-last", keep_tokens="all", preserve=0.1),
}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``."""
    settings, attributes = task.settings, read_attributes(task.settings.attributes)
    anchored = next((concept for concept in task.concepts if concept.anchor), None)
    if attributes and anchored:
        raise ForgetError(
            f"'{anchored.name}' has an anchor, and attributes are set: use one of the two."
        )
    pairs, kept = uce_rows(task)
    if attributes:
        names, weights = zip(*attributes)
        shifts = kept_contexts(task.model, names)
        pairs = Pairs(pairs.targets, debiased_anchors(pairs.targets, shifts, weights))
    edit = uce(*pairs, kept, settings.erase, settings.preserve, settings.damping)
    return input_patch(task, pairs, lambda denoiser: edit)


def uce_rows(task: Task) -> tuple[Pairs, Tensor]:
    """The rows c with c* to edit, and the rows k to keep, [m, D]; also of RECE."""
    settings, words = task.settings, task.kept_words()
    pairs = expanded_pairs(task.model, task.concepts, settings.tokens, settings.expand)
    if words and settings.keep_tokens == "all":
        words = ("", *words)
    return Pairs.cat(pairs), kept_contexts(task.model, words, settings.keep_tokens)
