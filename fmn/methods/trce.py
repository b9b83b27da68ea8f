"""TRCE, first stage (Chen et al. 2025, arXiv 2503.07389): a closed form on the end of the text.

The embedding of the first end-of-text token sums up a prompt, also what it says by other words. So
that of many prompts with the concept is read as that of the same prompts with the anchor.
"""

from dataclasses import dataclass

import torch

from ..closed_form.input_edit import input_patch, uce
from ..closed_form.text_embeddings import end_pairs, kept_contexts
from ..concepts.prompt_templates import sentences
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from . import shared_settings as shared

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
    erase: float = shared.erase()
    preserve: float = shared.preserve(default=0.01)
    damping: float = shared.damping(default=0.1)
    keep_list: str = shared.keep_list()
    rank: int = shared.solved_rank(default=8)


PRESETS = {"trce": Settings(), "trce-released": Settings(prompts=15, damping=1e-3, rank=0)}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch; see ``methods.forget``.

    TRCE's objective of its first stage is UCE's with c and c* the EOT embeddings of prompts with
    the concept and with its anchor, as means over N prompts and M kept ones:
    e/N sum |W' c - W c*|^2 + p/M sum |W' k - W k|^2 + l |W' - W|^2.
    """
    settings = task.settings
    texts = [pair for concept in task.concepts for pair in sentences(concept, settings.prompts)]
    pairs = end_pairs(task.model, texts, settings.ends)
    words = ("", *task.kept_words()) if settings.preserve else ()
    kept = kept_contexts(task.model, words, "all")
    weights = settings.erase / len(texts), settings.preserve / max(len(words), 1)
    edit = uce(*pairs, kept, *weights, settings.damping)
    return input_patch(task, pairs, lambda denoiser: edit)
