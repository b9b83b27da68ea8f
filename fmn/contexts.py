"""The text embeddings that closed forms work on, as rows of float64 matrices.

A closed form edits W so that W c becomes what W c* was, for the contexts c of a concept's tokens
and c* of its anchor's. Which tokens those are decides much: ``TOKENS``.
"""

from typing import NamedTuple

import torch

from .concept import Prompt
from .errors import ForgetError
from .keep import CHOICES
from .model import PLACEHOLDER
from .settings import setting
from .spans import END, SECTION, subject_positions, word_positions

TOKENS = ("last", "from-last", "subject", "all")
KEEP_TOKENS = ("last", "all")
ENDS_AT_ONCE = 64  # pairs of prompts

OBJECT_TEMPLATES = (
    "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}",
)  # fmt: skip
ART_TEMPLATES = (
    "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}",
)  # fmt: skip


def tokens_setting(default="last"):
    return setting(
        default,
        "Which of the concept's tokens are edited. last: its last one. from-last: that one, the "
        "end of the text and its padding. subject: all of its words. all: every position but the "
        "start.",
        choices=TOKENS,
    )


def keep_tokens_setting(default="last"):
    return setting(
        default,
        "Which tokens of kept words stay. last: the last one. all: every position, padding and "
        "the empty prompt too.",
        choices=KEEP_TOKENS,
    )


def keep_list_setting():
    return setting(
        "auto",
        "Shipped list of what to keep, beside what is connected. auto: by the concept's kind.",
        choices=CHOICES,
    )


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
    released code of UCE. Of a longer prompt, only the section of 77 tokens with the subject's last
    mention counts: others know nothing of it.

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
    made = [_pair(model, prompt, concept.anchor, text, tokens) for prompt, text in found]
    return Pairs.cat(made + _learned_pairs(model, concept, tokens))


def _learned_pairs(model, concept, tokens):
    """Pairs of the embeddings that attacks found, which stand alone in a prompt as a name would."""
    if not concept.learned:
        return []
    other, other_last = _anchor(model, Prompt("", concept.anchor), concept.anchor)
    made = []
    with model.borrow_text() as encoder, torch.no_grad():
        for vectors in concept.learned:
            if vectors.dim() != 2 or vectors.shape[1] != encoder.width:
                raise ForgetError(
                    f"A learned embedding of '{concept.name}' has shape {list(vectors.shape)}, and "
                    f"the text encoder reads [k, {encoder.width}]: learn it on this model."
                )
            text, _ = encoder.encode(PLACEHOLDER, vectors)
            target = text.context[0].cpu().double()
            rows = _rows(tokens, len(vectors), 1)
            made.append(_beside(target, other, rows, len(vectors), other_last))
    return made


def _pair(model, prompt, anchor, anchor_text, tokens):
    target, last, first = _encoded(model, prompt)
    other, other_last = _anchor(model, prompt._replace(subject=anchor), anchor_text)
    return _beside(target, other, _rows(tokens, last, first), last, other_last)


def _anchor(model, prompt, text):
    """The section [77, D] of an anchor's prompt, and where the anchor ends: none ends at BOS."""
    if not text:
        return model.encode(Prompt("", "")).context[0].cpu().double(), 0
    return _encoded(model, prompt._replace(text=text))[:2]


def _rows(tokens, last, first):
    """The positions that ``TOKENS`` mean, for a subject from ``first`` to ``last``."""
    end = SECTION - 1 if tokens in ("from-last", "all") else last
    return torch.arange(
        {"last": last, "from-last": last, "subject": first, "all": 1}[tokens], end + 1
    )


def anchor_context(model, concept):
    """The context [77, D] of a concept's anchor alone."""
    return model.encode_all([concept.anchor])[0].cpu().double()


def _beside(target, other, rows, position, other_position):
    """Rows of one section, each with the other section's row that is as far from its position."""
    # BOS is the same in every prompt: it stands for words that only the empty anchor lacks.
    lowest = 1 if other_position else 0
    beside = (rows - position + other_position).clamp(lowest, SECTION - 1)
    return Pairs(target[rows], other[beside])


def _encoded(model, prompt):
    """The section [77, D] with a subject's last mention, and where in it that ends and begins."""
    ids = model.tokenize(prompt)
    subject = model.tokenize(prompt._replace(text=prompt.subject, plain=True))
    found = subject_positions(ids, subject)
    if not found:
        raise ForgetError(
            f"The tokens of '{prompt.subject}' are not in the encoded prompt '{prompt.text}': "
            "set it apart by spaces, spell it the same way, and keep it whole."
        )
    section = found[-1] // SECTION * SECTION
    first = max(found[-len(word_positions(subject))] - section, 1)
    context = model.encode(prompt).context[0].cpu().double()
    return context[section : section + SECTION], found[-1] - section, first


def end_pairs(model, texts, which="first"):
    """The contexts of prompts' ends, each beside that of the prompt it stands for.

    Args:
        texts: [(text, anchored text)], plain strings of at most 75 tokens.
        which: ``first``: the first EOT. ``all``: that and all padding behind it.
    """
    found = []
    # Whole sections of hundreds of concepts would not fit into memory.
    for begin in range(0, len(texts), ENDS_AT_ONCE):
        both = [text for pair in texts[begin : begin + ENDS_AT_ONCE] for text in pair]
        contexts = model.encode_all(both).cpu().double()
        ends = [_first_end(model, text) for text in both]
        for i in range(0, len(both), 2):
            rows = torch.arange(ends[i], (ends[i] if which == "first" else SECTION - 1) + 1)
            found.append(_beside(contexts[i], contexts[i + 1], rows, ends[i], ends[i + 1]))
    return Pairs.cat(found)


def _first_end(model, text):
    return model.tokenize(Prompt(text, text))[:SECTION].index(END)


def kept_contexts(model, texts, tokens="last"):
    """Contexts [n, D] in float64 of what is to stay.

    Args:
        texts: words or prompts of at most 75 tokens.
        tokens: ``last``: the last word's token of each, BOS for "". ``all``: every position.
    """
    if not texts:
        return torch.zeros(0, model.family.context_dim, dtype=torch.float64)
    contexts = model.encode_all(texts).cpu().double()
    if tokens == "all":
        return contexts.flatten(0, 1)
    last = torch.tensor([_first_end(model, text) - 1 for text in texts])
    return contexts[torch.arange(len(texts)), last]
