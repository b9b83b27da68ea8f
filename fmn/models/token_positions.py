"""Which positions of an encoded prompt belong to the concept, and which end it.

A prompt is one or more chunks of 77 CLIP tokens: BOS, words, EOT, padding. Stable Diffusion 1.x
pads with EOT again, 2.x and the second encoder of XL with id 0. Ids of textual-inversion vectors
are None here and match nothing.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from ..concepts.concept import Prompt
from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError

CHUNK = 77
EOS_ID = 49407  # CLIP's <|endoftext|>
END_TOKENS = ("none", "first", "all")

TokenIds = Sequence[int | None]  # of a whole prompt, a multiple of CHUNK
Tokenize = Callable[[Prompt], TokenIds]
PUNCTUATION = r"(?:[^\w\s]|_){0,8}"


def word_positions(ids: TokenIds) -> list[int]:
    """Positions of the prompt's words: after each chunk's BOS, before its first EOT."""
    words: list[int] = []
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        end = chunk.index(EOS_ID) if EOS_ID in chunk else len(chunk)
        words += range(start + 1, start + end)
    return words


def mentions(tokenize: Tokenize, prompt: Prompt) -> list[list[int]]:
    """Positions of each mention of a prompt's subject, in order, also across chunks.

    CLIP joins punctuation: "Wham!" before a comma ends in the token "!,". Such a token belongs to
    the mention.

    Raises:
        ForgetError: the subject has no tokens, or the prompt's tokens do not contain them.
    """
    ids = tokenize(prompt)
    words, read = word_positions(ids), list[TokenIds]()
    found: dict[tuple[int, ...], None] = {}
    for text in _with_punctuation(prompt):
        alone = tokenize(Prompt(text, text))
        subject = [alone[i] for i in word_positions(alone)]
        if not subject:
            raise ForgetError(f"The concept '{prompt.subject}' gives no tokens: type some letters.")
        # Where a part of them stands already, the punctuation behind it is not joined.
        if None in subject or any(_starts(subject, part) for part in read):
            continue
        read.append(subject)
        for start in _starts([ids[i] for i in words], subject):
            found[tuple(words[start : start + len(subject)])] = None
    if not found:
        raise ForgetError(
            f"The tokens of '{prompt.subject}' are not in the encoded prompt '{prompt.text}': "
            "set it apart by spaces, spell it the same way, and keep it whole."
        )
    return [list(mention) for mention in sorted(found)]


def _starts(ids: TokenIds, part: TokenIds) -> list[int]:
    count = len(part)
    return [i for i in range(len(ids) - count + 1) if ids[i : i + count] == part]


def _with_punctuation(prompt: Prompt) -> Iterator[str]:
    """The subject, then with the punctuation at its mentions that CLIP may join it to."""
    subject = prompt.subject
    yield subject
    ends = [subject[:1], subject[-1:]]
    if not any(re.fullmatch(PUNCTUATION, end) for end in ends):
        return
    pattern = f"({PUNCTUATION}){re.escape(subject)}({PUNCTUATION})"
    around = {match.groups() for match in re.finditer(pattern, prompt.words, re.IGNORECASE)}
    yield from sorted(
        {
            before[i:] + subject + behind[:j]
            for before, behind in around
            for i in range(len(before) + 1)
            for j in range(len(behind) + 1)
        },
        key=len,
    )


def end_positions(ids: TokenIds, which: str) -> list[int]:
    """Positions of EOT: ``none``, the ``first`` of each chunk, or ``all`` that have its id.

    ``all`` is the released rule (``use_pooler``). Where padding is EOT, as in Stable Diffusion
    1.x, it takes in every padding position: 73 of 77 for "a photo of elon musk".
    """
    if which == "none":
        return []
    ends = [i for i, token in enumerate(ids) if token == EOS_ID]
    if which == "first":
        return [i for i in ends if EOS_ID not in ids[i - i % CHUNK : i]]
    return ends


def flagged_positions(tokenize: Tokenize, prompt: Prompt, which_ends: str) -> list[int]:
    """Positions whose attention is to vanish: those of ``mentions`` and, if asked for, EOT."""
    positions = [position for mention in mentions(tokenize, prompt) for position in mention]
    return sorted({*positions, *end_positions(tokenize(prompt), which_ends)})


def tokenize_with_placeholders(
    ids_of: Callable[[str], list[int]], prompt: str, count: int
) -> list[int | None]:
    """One chunk of token ids, in which each ``PLACEHOLDER`` of a prompt takes some positions.

    Args:
        ids_of: function from a plain text to its ids, with BOS, EOT and padding.
        count: positions that a placeholder takes, 0 for none.

    Returns:
        77 ids, None at the placeholders' positions.

    Raises:
        ForgetError: a placeholder without vectors or the reverse, a vector among the words, or
            more words than a chunk holds.
    """
    pieces = prompt.split(PLACEHOLDER)
    if (len(pieces) > 1) != (count > 0):
        has, needs = ("", "no vectors") if len(pieces) > 1 else ("no ", "vectors")
        raise ForgetError(
            f"The prompt '{prompt:.60}' has {has}placeholder {PLACEHOLDER}, but {needs} came with "
            "it: give both or neither."
        )
    words: list[int | None] = []
    for i, piece in enumerate(pieces):
        ids = ids_of(piece)
        words += [None] * count if i else []
        words += [ids[position] for position in word_positions(ids)]
    empty = ids_of("")
    if len(words) > CHUNK - 2:
        raise ForgetError(
            f"The prompt '{prompt:.60}...' has {len(words)} tokens and one chunk holds "
            f"{CHUNK - 2}: shorten it."
        )
    return [empty[0], *words, EOS_ID, *[empty[-1]] * (CHUNK - 2 - len(words))]
