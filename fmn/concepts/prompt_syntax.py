r"""How names and prompts are read, on every host: as ComfyUI reads prompts.

``\(`` and ``\)`` are parentheses. ``(words)`` weighs 1.1 times what is around it, ``(words:1.3)``
1.3. What only other programs understand is refused, as it would be read as words.
"""

import re
from collections.abc import Iterator
from math import isfinite

from ..errors import ForgetError
from ..text import normalise

OTHERS = re.compile(  # of other programs: <lora:x:1>, {a|b}, [a:b:0.5], [a|b], __wildcard__
    r"<(?:lora|lyco|hypernet)\s*:[^<>]*>|\{[^{}]*\|[^{}]*\}|"
    r"\[[^\[\]]*(?:\|[^\[\]]*|:\s*[\d.]+\s*)\]|__\w[\w/*-]*?__",
    re.IGNORECASE,
)
CAPITALS = re.compile(r"(?<!\w)(?:BREAK|AND)(?!\w)")
WEIGHTS = re.compile(r"(?<!\\)\((?:\(|.*?:\s*[\d.]+\s*\))")
MAX_PARENTHESES = 200  # they nest
OPEN, CLOSE = "\x01", "\x02"  # stand for parentheses that are letters; ``normalise`` leaves none


def unescaped(text: str) -> str:
    r"""The text with parentheses for ``\(`` and ``\)``."""
    return text.replace(r"\(", "(").replace(r"\)", ")")


def escaped(text: str) -> str:
    """A plain text as a prompt: its parentheses are no weights."""
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


def plain_text(text: str) -> str:
    """A name, or a text that is read literally, as it is meant.

    Raises:
        ForgetError: it has weights, or the syntax of other programs.
    """
    text = normalise(text)
    if found := OTHERS.search(text) or WEIGHTS.search(text):
        raise ForgetError(
            f"'{text:.40}' has prompt syntax, '{found[0]:.20}', and is read as plain words: write "
            r"the words alone, and \( and \) for parentheses that belong to them."
        )
    return unescaped(text)


def prompt_text(text: str) -> str:
    """A prompt without what cannot be seen; see ``weighted``.

    Raises:
        ForgetError: it has the syntax of other programs, or weights that are none.
    """
    text = normalise(text)
    if found := OTHERS.search(text) or CAPITALS.search(text):
        raise ForgetError(
            f"The prompt '{text:.80}' has '{found[0]:.40}', syntax of other programs that is not "
            "read here: take it out, or write BREAK and AND in small letters if you mean the word."
        )
    if text.count("(") > MAX_PARENTHESES or not all(isfinite(w) for _, w in weighted(text)):
        raise ForgetError(
            f"The prompt '{text:.80}' has weights that are no numbers, or more than "
            f"{MAX_PARENTHESES} parentheses: write a weight as (dog:1.2)."
        )
    return text


def weighted(text: str) -> list[tuple[str, float]]:
    """The pieces of a prompt as ComfyUI cuts it, each with its weight: at least one."""
    marked = text.replace(r"\)", CLOSE).replace(r"\(", OPEN)
    pieces = [
        (piece.replace(CLOSE, ")").replace(OPEN, "("), weight)
        for piece, weight in _pieces(marked, 1.0)
    ]
    return pieces or [("", 1.0)]


def words_of_prompt(text: str) -> str:
    """A prompt's words, without weights."""
    return "".join(piece for piece, _ in weighted(text))


def _pieces(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for group in _groups(text):
        if len(group) < 2 or group[0] != "(" or group[-1] != ")":
            yield group, weight
            continue
        inner, own = group[1:-1], weight * 1.1
        words, _, number = inner.rpartition(":")
        if words:
            try:
                inner, own = words, float(number)
            except ValueError:
                inner = group[1:-1]  # the colon is a letter
        yield from _pieces(inner, own)


def _groups(text: str) -> list[str]:
    """What is outside of parentheses, and each outermost pair with its content, in order."""
    groups, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                groups.append(text[start:i])
                start = i
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                groups.append(text[start : i + 1])
                start = i + 1
    return [group for group in (*groups, text[start:]) if group]
