"""The text embeddings that closed forms work on, as rows of float64 matrices.

A closed form edits W so that W c becomes what W c* was, for the contexts c of a concept's tokens
and c* of its anchor's. Which tokens those are decides much: ``TOKENS``.
"""

from typing import NamedTuple

import torch

from .concept import Prompt
from .errors import ForgetError
from .spans import END, SECTION, subject_positions, word_positions

# last: the subject's last token. from-last: that one and all behind it, with EOT and padding.
# subject: the subject's tokens. all: every token but BOS.
TOKENS = ("last", "from-last", "subject", "all")

OBJECT_TEMPLATES = (
    "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}",
)  # fmt: skip
ART_TEMPLATES = (
    "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}",
)  # fmt: skip


class Pairs(NamedTuple):
    """Rows that belong together, float64 [n, D]: a concept's tokens and its anchor's."""

    targets: torch.Tensor
    anchors: torch.Tensor

    @staticmethod
    def cat(pairs):
        return Pairs(*(torch.cat(parts) for parts in zip(*pairs)))


def concept_pairs(model, concept, tokens="last", templates=()):
    """The contexts of a concept's tokens, each beside that of its anchor.

    A prompt's last token stands beside its anchor's, those behind it and before it likewise; an
    anchor with fewer words repeats its first. The empty prompt counts as its BOS, as in the
    released code of UCE.

    Args:
        tokens: of ``TOKENS``.
        templates: further prompts, with {} for the name.

    Raises:
        ForgetError: a concept's tokens cannot be found in its prompt.
    """
    found = concept.bare_prompts()
    for subject in concept.subjects:
        for template in templates:
            anchor = template.format(concept.anchor) if concept.anchor else ""
            found.append((Prompt(template.format(subject), subject), anchor))
    return Pairs.cat([_pair(model, prompt, concept.anchor, text, tokens) for prompt, text in found])


def _pair(model, prompt, anchor, anchor_text, tokens):
    target, last, first = _encoded(model, prompt)
    if anchor_text:
        other, other_last, _ = _encoded(model, Prompt(anchor_text, anchor, prompt.plain))
    else:
        other, other_last = model.encode(Prompt("", "")).context[0].double(), 0
    end = len(target) - 1 if tokens in ("from-last", "all") else last
    start = {"last": last, "from-last": last, "subject": first, "all": 1}[tokens]
    rows = torch.arange(start, end + 1)
    # BOS is the same in every prompt: it stands for words that only the empty anchor lacks.
    lowest = 1 if other_last else 0
    beside = (rows - last + other_last).clamp(lowest, len(other) - 1)
    return Pairs(target[rows], other[beside])


def _encoded(model, prompt):
    """Contexts [T, D] of a prompt, and where its subject ends and begins (its last mention)."""
    ids = model.tokenize(prompt)
    subject = model.tokenize(prompt._replace(text=prompt.subject, plain=True))
    found = subject_positions(ids, subject)
    if not found:
        raise ForgetError(
            f"The tokens of '{prompt.subject}' are not in the encoded prompt '{prompt.text}': "
            "set it apart by spaces, spell it the same way, and keep it whole."
        )
    length = len(word_positions(subject))
    return model.encode(prompt).context[0].double(), found[-1], found[-length]


def kept_contexts(model, texts, tokens="last"):
    """Contexts [n, D] in float64 of what is to stay.

    Args:
        texts: words or prompts of at most 75 tokens.
        tokens: ``last``: the last word's token of each. ``all``: every position.
    """
    if not texts:
        return torch.zeros(0, model.family.context_dim, dtype=torch.float64)
    contexts = model.encode_all(texts).double()
    if tokens == "all":
        return contexts.flatten(0, 1)
    ends = [model.tokenize(Prompt(text, text)) for text in texts]
    last = [max(ids[:SECTION].index(END) - 1, 0) for ids in ends]
    return contexts[torch.arange(len(texts)), torch.tensor(last)]
