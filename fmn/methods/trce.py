"""TRCE, first stage (Chen et al. 2025, arXiv 2503.07389): a closed form on the end of the text.

The embedding of the first end-of-text token sums up a prompt, also what it says by other words. So
that of many prompts with the concept is read as that of the same prompts with the anchor.
"""

import re
from dataclasses import dataclass

import torch

from ..closed_form import damping, erase, input_patch, preserve, rank_setting, uce
from ..contexts import end_pairs, keep_list_setting, kept_contexts
from ..fitting import autograd
from ..keep import keep_for
from ..settings import Settings as Base
from ..settings import setting

TITLE = "TRCE (closed form)"
ABOUT = (
    "The closed form of TRCE (arXiv 2503.07389): makes the end-of-text token of many prompts with "
    "the concept read as if they spoke of the anchor."
)
# Sentence i is frame i with setting i, both taken in turns. Their numbers have no common divisor,
# so all 11 x 20 and 9 x 20 pairs come before any comes again.
FRAMES = (
    "a photo of {} {}", "a painting of {} {}", "{} {}", "a picture of {} {}", "a drawing of {} {}",
    "a close-up of {} {}", "a poster of {} {}", "an illustration of {} {}", "a sketch of {} {}",
    "an old photo of {} {}", "a detailed picture of {} {}",
)  # fmt: skip
SETTINGS = (
    "", "at the beach", "in a forest", "on a table", "in a city at night", "in the snow",
    "with a cat", "in a kitchen", "in black and white", "near a house", "under a tree",
    "with a red car", "in the rain", "on a mountain", "with flowers", "in a museum",
    "beside a river", "with a child", "at sunset", "in an empty room",
)  # fmt: skip
STYLE_FRAMES = (
    "a painting of {1} by {0}", "{1}, {0}", "{1} in the style of {0}", "{0} of {1}",
    "an artwork by {0} that shows {1}", "{1} as {0}", "a picture of {1}, {0} style",
    "{0}, {1}", "a portrait of {1} inspired by {0}",
)  # fmt: skip
THINGS = (
    "a house", "a woman", "a dog", "a forest", "a city at night", "a bowl of fruit", "a ship",
    "a cat", "a bridge", "a mountain", "flowers in a vase", "a man with a hat", "a horse",
    "a street in the rain", "a castle", "a tree", "a child", "a river", "a car", "the sea",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(Base):
    prompts: int = setting(
        60,
        "Sentences with each name of the concept, from a fixed list. More cover more wordings and "
        "take longer to encode.",
        low=1,
        high=180,
    )
    ends: str = setting(
        "first",
        "Which end tokens are edited. first: the first end-of-text. all: also the padding behind.",
        choices=("first", "all"),
    )
    erase: float = erase()
    preserve: float = preserve(0.01)
    damping: float = damping(0.1)
    keep_list: str = keep_list_setting()
    rank: int = rank_setting(8)


PRESETS = {"trce": Settings(), "trce-released": Settings(prompts=15, damping=1e-3, rank=0)}


def sentences(concept, count):
    """[(text, anchored text)]: sentences with each name, then the concept's own prompts.

    Without an anchor the other sentence is the same one without the name. Own prompts are read
    literally: parentheses are no weights.
    """
    found = []
    for subject in concept.subjects:
        for i in range(count):
            other = _sentence(concept.kind, concept.anchor, i)
            found.append((_sentence(concept.kind, subject, i), other))
    own = concept.bare_prompts()[len(concept.subjects) :]
    return found + [(prompt.text, anchored or _without(prompt)) for prompt, anchored in own]


def _sentence(kind, name, i):
    frames, others = (STYLE_FRAMES, THINGS) if kind == "style" else (FRAMES, SETTINGS)
    return " ".join(frames[i % len(frames)].format(name, others[i % len(others)]).split())


def _without(prompt):
    """A concept's own prompt without the name."""
    return " ".join(re.sub(re.escape(prompt.subject), "", prompt.text, flags=re.I).split())


@autograd()
@torch.no_grad()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch; see ``methods.forget``."""
    texts = [pair for concept in concepts for pair in sentences(concept, settings.prompts)]
    pairs = end_pairs(model, texts, settings.ends)
    words = ("", *keep_for(concepts, keep, settings.keep_list)) if settings.preserve else ()
    kept = kept_contexts(model, words, "all")
    # Means over prompts, as released: the number of sentences is no strength.
    weights = settings.erase / len(texts), settings.preserve / max(len(words), 1)
    edit = uce(*pairs, kept, *weights, settings.damping)
    return input_patch(model, concepts, settings, pairs, lambda borrowed: edit, on_step=on_step)
