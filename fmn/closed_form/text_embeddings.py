"""The text embeddings that closed forms work on, as rows of float64 matrices.

A closed form edits W so that W c becomes what W c* was, for the contexts c of a concept's tokens
and c* of its anchor's. The choice of these tokens matters much: ``TOKENS``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..concepts.concept import Concept, Prompt
from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..models.interface import Text, UNetModel
from ..models.token_positions import CHUNK, EOS_ID, mentions

TOKENS = ("last", "from-last", "subject", "all")
ENDS_AT_ONCE = 64  # pairs of prompts
TEXTS_AT_ONCE = 128  # of about the same length

OBJECT_TEMPLATES = (
    "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}",
)  # fmt: skip
ART_TEMPLATES = (
    "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}",
)  # fmt: skip
EMPTY = Prompt("", "")


class EncodesText(Protocol):
    """The part of a ``UNetModel`` that gives contexts."""

    def tokenize(self, prompt: Prompt) -> Sequence[int | None]: ...

    def encode(self, prompt: Prompt) -> Text: ...

    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> Tensor: ...


class Pairs(NamedTuple):
    """Rows that belong together, float64 [n, D]: a concept's tokens and its anchor's."""

    targets: Tensor
    anchors: Tensor

    @staticmethod
    def cat(pairs: "Iterable[Pairs]") -> "Pairs":
        return Pairs(*(torch.cat(parts) for parts in zip(*pairs)))


def concept_pairs(
    model: EncodesText,
    concepts: Sequence[Concept],
    tokens: str = "last",
    templates_of: Callable[[Concept], Sequence[str]] = lambda concept: (),
) -> list[Pairs]:
    """The contexts of each concept's tokens beside those of its anchor: a ``Pairs`` a concept.

    A prompt's last token stands beside its anchor's, those behind it and before it likewise; an
    anchor with fewer words repeats its first. The empty prompt counts as its BOS, as in the
    released code of UCE. Of a longer prompt, only the chunk of 77 tokens with the subject's last
    mention counts: others know nothing of it.

    Args:
        model: a ``UNetModel``; the ``learned`` of concepts need its text encoder too.
        tokens: of ``TOKENS``.
        templates_of: gives further prompts of a concept, with {} for the name.

    Raises:
        ForgetError: a concept's tokens cannot be found in its prompt.
    """
    prompts_of = [_prompt_pairs(concept, templates_of(concept)) for concept in concepts]
    prompts = {prompt for pairs in prompts_of for pair in pairs for prompt in pair}
    mentioned = _encode_mentions(model, prompts, whole=tokens in ("from-last", "all"))
    pairs_of = []
    for concept, prompt_pairs in zip(concepts, prompts_of):
        pairs = []
        for prompt, anchor in prompt_pairs:
            target, other = mentioned[prompt], mentioned[anchor]
            rows = _selected_rows(tokens, target.last, target.first)
            pairs.append(_aligned(target.rows, other.rows, rows, target.last, other.last))
        pairs_of.append(Pairs.cat(pairs + _learned_pairs(model, concept, tokens)))
    return pairs_of


def expanded_pairs(
    model: EncodesText, concepts: Sequence[Concept], tokens: str, expand: bool
) -> list[Pairs]:
    """``concept_pairs``, also of UCE's templates around each name if ``expand``."""

    def templates_of(concept: Concept) -> Sequence[str]:
        templates = ART_TEMPLATES if concept.kind == "style" else OBJECT_TEMPLATES
        return templates if expand else ()

    return concept_pairs(model, concepts, tokens, templates_of)


def _prompt_pairs(concept: Concept, templates: Sequence[str]) -> list[tuple[Prompt, Prompt]]:
    """[(prompt, its anchor's)]; the empty one where there is no anchor."""
    anchored = concept.bare_prompts()
    for subject in concept.subjects:
        for template in templates:
            text = fill(template, concept.anchor) if concept.anchor else ""
            anchored.append((Prompt(fill(template, subject), subject), text))
    return [
        (prompt, prompt._replace(text=text, subject=concept.anchor) if text else EMPTY)
        for prompt, text in anchored
    ]


def _learned_pairs(model: Any, concept: Concept, tokens: str) -> list[Pairs]:
    """Pairs of the embeddings that attacks learned, which stand alone in a prompt as a name would;
    of a ``UNetModel``."""
    if not concept.learned:
        return []
    anchor = Prompt(concept.anchor, concept.anchor)
    other = _encode_mentions(model, {anchor}, whole=True)[anchor]
    pairs = []
    with model.borrow_text_encoder() as encoder, torch.no_grad():
        for vectors in concept.learned:
            if vectors.dim() != 2 or vectors.shape[1] != encoder.width:
                raise ForgetError(
                    f"A learned embedding of '{concept.name}' has shape {list(vectors.shape)}, and "
                    f"the text encoder reads [k, {encoder.width}]: learn it on this model."
                )
            text, _ = encoder.encode(PLACEHOLDER, vectors)
            target = text.context[0].cpu().double()
            rows = _selected_rows(tokens, len(vectors), 1)
            pairs.append(_aligned(target, other.rows, rows, len(vectors), other.last))
    return pairs


def _selected_rows(tokens: str, last: int, first: int) -> Tensor:
    """The positions of ``TOKENS`` for a subject from ``first`` to ``last``."""
    end = CHUNK - 1 if tokens in ("from-last", "all") else last
    start = {"last": last, "from-last": last, "subject": first, "all": 1}[tokens]
    return torch.arange(start, end + 1)


def _aligned(
    target: Tensor, other: Tensor, rows: Tensor, position: int, other_position: int
) -> Pairs:
    """Rows of one chunk, each with the other chunk's row at the same distance from its position."""
    # BOS is the same in every prompt: it stands for words that only the empty anchor lacks.
    lowest = 1 if other_position else 0
    beside = (rows - position + other_position).clamp(lowest, CHUNK - 1)
    return Pairs(target[rows], other[beside])


class _Mention(NamedTuple):
    """The chunk with a subject's last mention, and where in it that ends and begins.

    ``rows`` is the context [77, D], or only as much of it as holds the prompt's words.
    """

    rows: Tensor
    last: int
    first: int


def _encode_mentions(
    model: EncodesText, prompts: Iterable[Prompt], whole: bool
) -> dict[Prompt, _Mention]:
    """Prompt -> its subject's last mention, encoded; ``whole``: with all 77 rows."""
    mentioned, short = {}, []
    for prompt in prompts:
        ids = model.tokenize(prompt)
        start, last, first = _last_mention(model, prompt)
        if prompt.plain and len(ids) == CHUNK:
            short.append((prompt, CHUNK if whole else _first_end(ids) + 1, last, first))
        else:
            context = model.encode(prompt).context[0].cpu().double()
            mentioned[prompt] = _Mention(context[start : start + CHUNK], last, first)
    texts, lengths = [prompt.text for prompt, *_ in short], [length for _, length, *_ in short]
    for (prompt, _, last, first), rows in zip(short, first_tokens(model, texts, lengths)):
        mentioned[prompt] = _Mention(rows, last, first)
    return mentioned


def _last_mention(model: EncodesText, prompt: Prompt) -> tuple[int, int, int]:
    """Where the chunk with a subject's last mention starts, and the mention ends and begins."""
    if not prompt.text:
        return 0, 0, 0
    mention = mentions(model.tokenize, prompt)[-1]
    start = mention[-1] // CHUNK * CHUNK
    return start, mention[-1] - start, max(mention[0] - start, 1)


def first_tokens(model: EncodesText, texts: Sequence[str], lengths: Sequence[int]) -> list[Tensor]:
    """The first tokens of encoded texts: [length, D] each, float64, on the CPU.

    CLIP is causal: a token knows nothing of those behind it, so they need not be computed. Of a
    short text's 77 tokens that is nearly all.

    Args:
        texts: plain strings of at most 75 tokens.
        lengths: of each, at least up to its first end of text.
    """
    known: dict[tuple[int, str], Tensor] = {}
    order = sorted(set(zip(lengths, texts)))
    for begin in range(0, len(order), TEXTS_AT_ONCE):
        part = order[begin : begin + TEXTS_AT_ONCE]
        contexts = model.encode_all([text for _, text in part], part[-1][0]).cpu().double()
        known |= {key: rows[: key[0]] for key, rows in zip(part, contexts)}
    return [known[key] for key in zip(lengths, texts)]


def words_of(model: EncodesText, texts: Sequence[str]) -> list[Tensor]:
    """The contexts of texts up to the first end, including it: [n, D] each, float64."""
    lengths = [_first_end(model.tokenize(Prompt(text, text))) + 1 for text in texts]
    return first_tokens(model, texts, lengths)


def end_pairs(model: EncodesText, texts: Sequence[tuple[str, str]], which: str = "first") -> Pairs:
    """The contexts of prompts' ends, each beside that of its anchored prompt.

    Args:
        texts: [(text, anchored text)], plain strings of at most 75 tokens.
        which: ``first``: the first EOT. ``all``: that and all padding behind it.
    """
    pairs = []
    # Whole chunks of hundreds of concepts would not fit into memory.
    for begin in range(0, len(texts), ENDS_AT_ONCE):
        both = [text for pair in texts[begin : begin + ENDS_AT_ONCE] for text in pair]
        contexts: Sequence[Tensor]
        if which == "first":
            contexts = words_of(model, both)
            ends = [len(rows) - 1 for rows in contexts]
        else:
            contexts = list(model.encode_all(both).cpu().double())
            ends = [_first_end(model.tokenize(Prompt(text, text))) for text in both]
        for i in range(0, len(both), 2):
            rows = torch.arange(ends[i], (ends[i] if which == "first" else CHUNK - 1) + 1)
            pairs.append(_aligned(contexts[i], contexts[i + 1], rows, ends[i], ends[i + 1]))
    return Pairs.cat(pairs)


def encode_chunk(model: EncodesText, text: str | Prompt) -> Text:
    """A prompt, or a plain text, that fits into one chunk of 77 tokens: [1, 77, D].

    Raises:
        ForgetError: it does not fit.
    """
    prompt = text if isinstance(text, Prompt) else Prompt(text, text)
    encoded = model.encode(prompt)
    if encoded.context.shape[1] != CHUNK:
        raise ForgetError(f"'{prompt.text:.60}...' is too long: shorten it to 75 tokens.")
    return encoded


def _first_end(ids: Sequence[int | None]) -> int:
    return ids[:CHUNK].index(EOS_ID)


def kept_contexts(model: UNetModel, texts: Sequence[str], tokens: str = "last") -> Tensor:
    """Contexts [n, D] in float64 of what is kept.

    Args:
        texts: words or prompts of at most 75 tokens.
        tokens: ``last``: the last word's token of each, BOS for "". ``all``: every position.
    """
    if not texts:
        return torch.zeros(0, model.family.context_dim, dtype=torch.float64)
    if tokens == "all":
        return model.encode_all(texts).cpu().double().flatten(0, 1)
    return torch.stack([rows[-2] for rows in words_of(model, texts)])
