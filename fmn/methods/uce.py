"""Unified Concept Editing (Gandikota et al. 2024, arXiv 2308.14761), a closed form.

Keys and values of cross-attention are solved anew so that the concept's tokens are read as its
anchor's, and kept ones as before. Here as an exact low rank; see ``fmn.closed_form.input_edit``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..closed_form.input_edit import debiased_anchors, input_patch, uce
from ..closed_form.output_edit import PartProgress
from ..closed_form.reduced_rank import reduced_rank_ridge
from ..closed_form.text_embeddings import Pairs, expanded_pairs, kept_contexts
from ..concepts.concept import Prompt
from ..concepts.keep_list import keep_for
from ..concepts.prompt_templates import kept_sentences, sentences
from ..errors import ForgetError
from ..linalg import to_float64
from ..models.interface import TransformerModel
from ..models.recording import Rows, TextRows, text_rows
from ..models.sampling import seeded_noise
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import setting
from . import shared_settings as shared
from .reread.regression_data import no_difference

TITLE = "UCE"
REVISION = 1
TRANSFORMERS = True
# Of transformers
SENTENCES = 10  # with each of a concept's names
KEPT_SENTENCES = 128  # of the shipped keep-list
KEPT_WEIGHT = 4.0  # of kept tokens at preserve 1
TOKENS = 32  # of a prompt
SIDE = 16  # of the latents beside the text
TINY = 1e-9  # for erase 0
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
    if not task.model.family.known:
        return text_patch(task)
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


def text_patch(task: Task) -> ForgetPatch:
    """UCE of the layers that read a transformer's text; see ``docs/methods/uce.md``.

    What they get and give is recorded, as W c* - W c = y* - y: no weight is read. The record's
    losses are 1 and the mean share of |W c* - W c|^2 that is left.

    Raises:
        ForgetError: a setting is not for transformers; a concept's sentences are encoded as those
            without it; the model gives numbers that are not finite.
    """
    model, settings = cast(TransformerModel, task.model), task.settings
    _refuse_for_transformers(task)
    pairs = [sentences(concept, SENTENCES) for concept in task.concepts]
    kept = _kept_sentences(task)
    every = ["", *(text for some in pairs for pair in some for text in pair), *kept]
    # Before the model is loaded: text encoders may be as large.
    texts = {text: model.encode(Prompt(text, "")) for text in dict.fromkeys(every)}
    for some in pairs:
        if all(torch.equal(texts[text].context, texts[other].context) for text, other in some):
            raise no_difference(*some[0])
    layers, progress = model.family.text_readers(), PartProgress(task.on_step, len(every))
    noise = seeded_noise([0], SIDE, model.family.latent_channels)
    with model.watch(1, SIDE) as watched:

        def rows(text: str) -> TextRows:
            progress(1.0)
            return text_rows(watched, layers, noise, texts[text])

        empty = rows("")
        moves = [[moved(rows(text), rows(other), empty) for text, other in some] for some in pairs]
        held = [informative(rows(text), empty) for text in kept]
    changes, shares = {}, []
    for name in layers:
        wanted = [Rows(*map(torch.cat, zip(*(move[name] for move in some)))) for some in moves]
        others = torch.cat([row[name].inputs for row in held])
        up, down = solved(name, wanted, others, settings)
        changes[name] = up.float(), down.float()
        for inputs, change in wanted:
            left = inputs @ down.mT @ up.mT - change
            shares.append(float(left.square().sum() / change.square().sum().clamp(min=1e-300)))
    return task.patch(changes, [1.0, sum(shares) / len(shares)])


def _refuse_for_transformers(task: Task) -> None:
    names = ("tokens", "expand", "attributes", "keep_tokens")
    given = [name for name in names if getattr(task.settings, name) != getattr(Settings(), name)]
    given += ["learned embeddings"] * any(concept.learned for concept in task.concepts)
    if given:
        raise ForgetError(
            f"UCE has {', '.join(given)} for U-Nets only, and {task.model.family.title} is none: "
            "leave them out, or take the method Re-read."
        )


def _kept_sentences(task: Task) -> list[str]:
    """The empty prompt, sentences of shipped words, and the user's words and prompts."""
    if not task.settings.preserve:
        return [""]
    words = keep_for(task.concepts, (), task.settings.keep_list)
    styles = keep_for(task.concepts, (), "styles")
    shipped = kept_sentences(words, styles, min(len(words), KEPT_SENTENCES))
    return [*shipped, *keep_for(task.concepts, task.keep, "none")]


def informative(rows: TextRows, empty: TextRows) -> TextRows:
    """Of a prompt's tokens the ``TOKENS`` that are least like any of the empty prompt, in float64:
    templates and padding say nothing."""
    chosen = {}
    for name, (inputs, outputs) in rows.items():
        distance = torch.cdist(inputs, empty[name].inputs).amin(1)
        index = distance.topk(min(TOKENS, len(inputs))).indices
        chosen[name] = Rows(to_float64(inputs[index]), to_float64(outputs[index]))
    return chosen


def moved(rows: TextRows, other: TextRows, empty: TextRows) -> TextRows:
    """A prompt's inputs c, and y* - y: what its outputs lack to be those of the tokens c* of the
    other prompt, each the nearest to c."""
    moves = {}
    for name, (inputs, outputs) in informative(rows, empty).items():
        others, wanted = map(to_float64, other[name])
        moves[name] = Rows(inputs, wanted[torch.cdist(inputs, others).argmin(1)] - outputs)
    return moves


def solved(
    name: str, wanted: Sequence[Rows], kept: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """up and down of a layer's change; means over tokens take the place of equation 7's sums."""
    if not all(part.isfinite().all() for part in (*(x for rows in wanted for x in rows), kept)):
        raise ForgetError(
            f"'{name}' gave numbers that are not finite: load the model in bfloat16 or float32."
        )
    return reduced_rank_ridge(
        wanted,
        kept,
        KEPT_WEIGHT * settings.preserve / max(settings.erase, TINY),
        settings.damping,
        shared.rank_in_all(settings.rank, len(wanted)),
    )
