"""The text embeddings that closed forms work on, as rows of float64 matrices.

A closed form edits W so that W c becomes what W c* was, for the contexts c of a concept's tokens
and c* of its anchor's. Which tokens those are decides much: ``TOKENS``.
"""

from typing import NamedTuple

import torch

from ..concepts.concept import Prompt
from ..concepts.keep_list import CHOICES
from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError
from ..models.token_positions import CHUNK, EOS_ID, mentions, word_positions
from ..settings import setting

TOKENS = ("last", "from-last", "subject", "all")
KEEP_TOKENS = ("last", "all")
ENDS_AT_ONCE = 64  # pairs of prompts
TEXTS_AT_ONCE = 128  # of about the same length

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
        advanced=True,
    )


def keep_tokens_setting():
    return setting(
        "last",
        "Which tokens of kept words stay. last: the last one. all: every position, padding and "
        "the empty prompt too.",
        choices=KEEP_TOKENS,
        advanced=True,
    )


def keep_list_setting():
    return setting(
        "auto",
        "Shipped list of what to keep, beside what is connected. auto: by the concept's kind.",
        choices=CHOICES,
    )


EMPTY = Prompt("", "")


def templates_of(concept):
    """UCE's further prompts of a concept."""
    return ART_TEMPLATES if concept.kind == "style" else OBJECT_TEMPLATES


class Pairs(NamedTuple):
    """Rows that belong together, float64 [n, D]: a concept's tokens and its anchor's."""

    targets: torch.Tensor
    anchors: torch.Tensor

    @staticmethod
    def cat(pairs):
        return Pairs(*(torch.cat(parts) for parts in zip(*pairs)))


def concept_pairs(model, concepts, tokens="last", further=lambda concept: ()):
    """The contexts of each concept's tokens beside those of its anchor: a ``Pairs`` a concept.

    A prompt's last token stands beside its anchor's, those behind it and before it likewise; an
    anchor with fewer words repeats its first. The empty prompt counts as its BOS, as in the
    released code of UCE. Of a longer prompt, only the section of 77 tokens with the subject's last
    mention counts: others know nothing of it.

    Args:
        tokens: of ``TOKENS``.
        further: function from a concept to further prompts, with {} for the name.

    Raises:
        ForgetError: a concept's tokens cannot be found in its prompt.
    """
    asked = [_asked(concept, further(concept)) for concept in concepts]
    prompts = {prompt for pairs in asked for pair in pairs for prompt in pair}
    encoded = _encoded(model, prompts, whole=tokens in ("from-last", "all"))
    found = []
    for concept, pairs in zip(concepts, asked):
        made = []
        for prompt, anchor in pairs:
            (target, last, first), (other, other_last, _) = encoded[prompt], encoded[anchor]
            made.append(_beside(target, other, _rows(tokens, last, first), last, other_last))
        found.append(Pairs.cat(made + _learned_pairs(model, concept, tokens)))
    return found


def _asked(concept, templates):
    """[(prompt, its anchor's)]; the empty one where there is no anchor."""
    found = concept.bare_prompts()
    for subject in concept.subjects:
        for template in templates:
            anchor = template.format(concept.anchor) if concept.anchor else ""
            found.append((Prompt(template.format(subject), subject), anchor))
    return [
        (prompt, prompt._replace(text=text, subject=concept.anchor) if text else EMPTY)
        for prompt, text in found
    ]


def _learned_pairs(model, concept, tokens):
    """Pairs of the embeddings that attacks found, which stand alone in a prompt as a name would."""
    if not concept.learned:
        return []
    anchor = Prompt(concept.anchor, concept.anchor)
    other, other_last, _ = _encoded(model, {anchor}, whole=True)[anchor]
    made = []
    with model.borrow_text_encoder() as encoder, torch.no_grad():
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


def _rows(tokens, last, first):
    """The positions that ``TOKENS`` mean, for a subject from ``first`` to ``last``."""
    end = CHUNK - 1 if tokens in ("from-last", "all") else last
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
    beside = (rows - position + other_position).clamp(lowest, CHUNK - 1)
    return Pairs(target[rows], other[beside])


def _encoded(model, prompts, whole):
    """Prompt -> the section with its subject's last mention, where in it that ends and begins.

    The section is [77, D], or if not ``whole`` as much of it as holds the prompt's words.
    """
    found, plain = {}, {}
    for prompt in prompts:
        ids = model.tokenize(prompt)
        section, last, first = _mentioned(model, prompt, ids)
        if prompt.plain and len(ids) == CHUNK:
            plain[prompt] = CHUNK if whole else _first_end(ids) + 1
            found[prompt] = None, last, first
        else:
            context = model.encode(prompt).context[0].cpu().double()
            found[prompt] = context[section : section + CHUNK], last, first
    texts = [prompt.text for prompt in plain]
    for prompt, rows in zip(plain, beginnings(model, texts, list(plain.values()))):
        found[prompt] = rows, *found[prompt][1:]
    return found


def _mentioned(model, prompt, ids):
    """Where the section with a subject's last mention starts, and the mention ends and begins."""
    if not prompt.text:
        return 0, 0, 0
    subject = model.tokenize(prompt._replace(text=prompt.subject, plain=True))
    found = mentions(prompt, ids, subject)
    section = found[-1] // CHUNK * CHUNK
    return section, found[-1] - section, max(found[-len(word_positions(subject))] - section, 1)


def beginnings(model, texts, lengths):
    """The first tokens of encoded texts: [length, D] each, float64, on the CPU.

    CLIP is causal, a token knows nothing of those behind it: so they need not be computed. Of a
    short text's 77 tokens that is nearly all.

    Args:
        texts: plain strings of at most 75 tokens.
        lengths: of each, at least up to its first end of text.
    """
    found, order = {}, sorted(set(zip(lengths, texts)))
    for begin in range(0, len(order), TEXTS_AT_ONCE):
        part = order[begin : begin + TEXTS_AT_ONCE]
        contexts = model.encode_all([text for _, text in part], part[-1][0]).cpu().double()
        found |= {each: rows[: each[0]] for each, rows in zip(part, contexts)}
    return [found[each] for each in zip(lengths, texts)]


def words_of(model, texts):
    """The contexts of texts up to the first end, that included: [n, D] each, float64."""
    lengths = [_first_end(model.tokenize(Prompt(text, text))) + 1 for text in texts]
    return beginnings(model, texts, lengths)


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
        if which == "first":
            contexts = words_of(model, both)
            ends = [len(rows) - 1 for rows in contexts]
        else:
            contexts = model.encode_all(both).cpu().double()
            ends = [_first_end(model.tokenize(Prompt(text, text))) for text in both]
        for i in range(0, len(both), 2):
            rows = torch.arange(ends[i], (ends[i] if which == "first" else CHUNK - 1) + 1)
            found.append(_beside(contexts[i], contexts[i + 1], rows, ends[i], ends[i + 1]))
    return Pairs.cat(found)


def _first_end(ids):
    return ids[:CHUNK].index(EOS_ID)


def kept_contexts(model, texts, tokens="last"):
    """Contexts [n, D] in float64 of what is to stay.

    Args:
        texts: words or prompts of at most 75 tokens.
        tokens: ``last``: the last word's token of each, BOS for "". ``all``: every position.
    """
    if not texts:
        return torch.zeros(0, model.family.context_dim, dtype=torch.float64)
    if tokens == "all":
        return model.encode_all(texts).cpu().double().flatten(0, 1)
    return torch.stack([rows[-2] for rows in words_of(model, texts)])
