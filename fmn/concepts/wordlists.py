"""Reading the word lists shipped in ``fmn/concepts/lists``."""

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "lists"
COMMENT = re.compile(r"(?:^|\s)#.*")


def lines_of(text: str) -> list[tuple[int, str]]:
    """(line number from 1, content) of every line with content; ``#`` starts a comment at the
    beginning of a line or after a space."""
    stripped = (COMMENT.sub("", line).strip() for line in text.splitlines())
    return [(number, line) for number, line in enumerate(stripped, 1) if line]


@cache
def entries(name: str) -> tuple[str, ...]:
    """The entries of a shipped list, in the order of the file."""
    return tuple(line for _, line in lines_of(_read(name)))


@cache
def unsafe_terms() -> dict[str, tuple[tuple[str, str], ...]]:
    """Category -> ((term, phrase), ...) of ``unsafe.txt``.

    The term is what is forgotten ("naked"), the phrase is how a prompt holds it ("a naked
    person"); without one in the file it is the term.
    """
    sections: dict[str, list[tuple[str, str]]] = {}
    for line in entries("unsafe"):
        if line.startswith("["):
            sections[line.strip("[]")] = terms = []
        else:
            term, _, phrase = (part.strip() for part in line.partition(":"))
            terms.append((term, phrase or term))
    return {category: tuple(terms) for category, terms in sections.items()}


def _read(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
