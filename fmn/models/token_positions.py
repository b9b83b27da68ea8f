"""Which positions of an encoded prompt belong to the concept, and which end it.

A prompt is one or more chunks of 77 CLIP tokens: BOS, words, EOT, padding. Stable Diffusion 1.x
pads with EOT again, 2.x and the second encoder of XL with id 0. Ids of textual-inversion vectors
are None here and match nothing.
"""

from collections.abc import Callable, Sequence

from ..concepts.concept import Prompt
from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError

CHUNK = 77
EOS_ID = 49407  # CLIP's <|endoftext|>
END_TOKENS = ("none", "first", "all")

TokenIds = Sequence[int | None]  # of a whole prompt, a multiple of CHUNK


def word_positions(ids: TokenIds) -> list[int]:
    """Positions of the prompt's words: after each chunk's BOS, before its first EOT."""
    words: list[int] = []
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        end = chunk.index(EOS_ID) if EOS_ID in chunk else len(chunk)
        words += range(start + 1, start + end)
    return words


def subject_positions(ids: TokenIds, subject_ids: TokenIds) -> list[int]:
    """Positions of every occurrence of the subject's tokens in a row, also across chunks.

    Args:
        ids: token ids of the whole prompt.
        subject_ids: token ids of the subject encoded alone.
    """
    subject = [subject_ids[i] for i in word_positions(subject_ids)]
    words = word_positions(ids)
    if not subject or None in subject:
        return []
    positions: set[int] = set()
    for start in range(len(words) - len(subject) + 1):
        window = words[start : start + len(subject)]
        if [ids[i] for i in window] == subject:
            positions.update(window)
    return sorted(positions)


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


def mentioned_positions(prompt: Prompt, ids: TokenIds, subject_ids: TokenIds) -> list[int]:
    """``subject_positions`` of a prompt's subject.

    Raises:
        ForgetError: the prompt's tokens do not contain the subject's.
    """
    positions = subject_positions(ids, subject_ids)
    if not positions:
        raise ForgetError(
            f"The tokens of '{prompt.subject}' are not in the encoded prompt '{prompt.text}': "
            "set it apart by spaces, spell it the same way, and keep it whole."
        )
    return positions


def flagged_positions(
    prompt: Prompt, ids: TokenIds, subject_ids: TokenIds, which_ends: str
) -> list[int]:
    """Positions whose attention is to vanish: the subject's and, if asked for, EOT.

    Raises:
        ForgetError: the subject has no tokens, or the prompt's tokens do not contain them.
    """
    if not word_positions(subject_ids):
        raise ForgetError(f"The concept '{prompt.subject}' gives no tokens: type some letters.")
    positions = mentioned_positions(prompt, ids, subject_ids)
    return sorted({*positions, *end_positions(ids, which_ends)})


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
