"""What to keep when concepts are forgotten: the user's words, and the lists shipped here."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ..errors import ForgetError
from ..text import ARTICLES
from .concept import Concept
from .prompt_syntax import plain_text
from .wordlists import entries

Words = tuple[str, ...]  # of a text, as ``_words`` gives them

LISTS = ("none", "common", "styles", "artists", "people")
CHOICES = ("auto", *LISTS)

# What "auto" takes for each kind; "everyday" has people in everyday clothes and situations.
AUTO = {
    "identity": ("people", "common"),
    "object": ("common",),
    "style": ("styles", "artists", "common"),
    "unsafe": ("common", "people", "everyday"),
    "custom": ("common",),
}
# Where the neighbours of each kind may be found; see ``candidates``.
NEIGHBOURS = {
    "identity": ("people", "common", "things"),
    "object": ("common", "things"),
    "style": ("styles", "artists"),
    "unsafe": ("everyday", "people", "common"),
    "custom": ("common", "things"),
}


def keep_words(name: str) -> tuple[str, ...]:
    """The entries of a shipped list, one of ``LISTS``, in its order; "none" is empty.

    Raises:
        ForgetError: there is no such list.
    """
    if name not in LISTS:
        raise ForgetError(f"There is no keep-list '{name}': choose one of {', '.join(LISTS)}.")
    return () if name == "none" else entries(name)


def keep_for(
    concepts: Sequence[Concept], given: Iterable[str] = (), lists: str = "auto"
) -> tuple[str, ...]:
    """Words and prompts that a method keeps while it forgets some concepts.

    Args:
        concepts: to forget.
        given: the user's words and prompts. They go first and stay, whatever they contain.
        lists: one of ``CHOICES``; "auto" takes the lists of ``AUTO`` for the concepts' kinds.

    Returns:
        strings, each once, in a stable order. An entry of a list is left out if it contains a
        forgotten name or alias, is contained in a concept's name, or equals an anchor. Whole words
        count; letter case, accents, an article in front and simple plurals (-s, -es, -ies) make no
        difference.

    Raises:
        ForgetError: there is no such list, or a given word has prompt syntax or is itself to be
            forgotten.
    """
    if lists not in CHOICES:
        raise ForgetError(f"There is no keep-list '{lists}': choose one of {', '.join(CHOICES)}.")
    subjects = _by_first_word(_subjects(concepts))
    own = [text for text in map(plain_text, given) if text]
    for text in own:
        words = _words(text)
        if words and any(_same(words, subject) for subject in subjects.get(words[0], ())):
            raise ForgetError(
                f"'{text}' is both to be kept and to be forgotten: take it out of one of the two."
            )
    return _unique([*own, *_without(concepts, _chosen(concepts, lists))])


def candidates(concepts: Sequence[Concept], kind: str) -> tuple[str, ...]:
    """Entries of the shipped lists that may be neighbours of one of the concepts, of a kind,
    without what ``keep_for`` leaves out."""
    return _unique(_without(concepts, [e for name in NEIGHBOURS[kind] for e in entries(name)]))


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    """Each text once, whatever its letter case."""
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(text.casefold(), text)
    return tuple(unique.values())


def _subjects(concepts: Sequence[Concept]) -> list[str]:
    return [subject for concept in concepts for subject in concept.subjects]


def _without(concepts: Sequence[Concept], texts: Iterable[str]) -> list[str]:
    """The texts that name neither a concept nor its anchor, nor a part of its name."""
    subjects = _by_first_word(_subjects(concepts))
    anchors = _by_first_word(concept.anchor for concept in concepts)
    names = _by_form((name, name) for name in (_words(concept.name) for concept in concepts))

    def is_left_out(words: Words) -> bool:
        return bool(words) and (
            any(
                _same(words[i : i + len(subject)], subject)
                for i, word in enumerate(words)
                for subject in subjects.get(word, ())
            )
            or any(_holds(name, words) for name in names.get(words[0], ()))
            or any(_same(words, anchor) for anchor in anchors.get(words[0], ()))
        )

    return [text for text in texts if not is_left_out(_words(text))]


def _by_first_word(texts: Iterable[str]) -> dict[str, list[Words]]:
    """The words of texts, under each form of the first one."""
    return _by_form((words[:1], words) for words in map(_words, texts))


def _by_form(texts: Iterable[tuple[Words, Words]]) -> dict[str, list[Words]]:
    """Texts under each form of their keys, both as words: thousands of them are found at once."""
    index = defaultdict(list)
    for keys, words in texts:
        for form in {form for key in keys for form in _forms(key)}:
            index[form].append(words)
    return index


def _chosen(concepts: Sequence[Concept], lists: str) -> Sequence[str]:
    if lists != "auto":
        return keep_words(lists)
    names = [name for concept in concepts for name in AUTO[concept.kind]]
    return [text for name in dict.fromkeys(names) for text in entries(name)]


@lru_cache(maxsize=4096)
def _words(text: str) -> Words:
    """The words of a text without case, accents and an article in front."""
    letters = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    words = tuple(re.findall(r"\w+", plain.casefold()))
    return words[1:] if len(words) > 1 and words[0] in ARTICLES else words


@lru_cache(maxsize=4096)
def _forms(word: str) -> set[str]:
    """The word with its simple plurals and singulars; ``b in _forms(a)`` if ``a in _forms(b)``."""
    forms = {word, f"{word}s", f"{word}es"}
    for ending, other in (("y", "ies"), ("ies", "y"), ("s", ""), ("es", "")):
        if word.endswith(ending):
            forms.add(word.removesuffix(ending) + other)
    return forms


def _same(words: Words, others: Words) -> bool:
    return len(words) == len(others) > 0 and all(b in _forms(a) for a, b in zip(words, others))


def _holds(words: Words, part: Words) -> bool:
    """Whether ``part`` is a run of ``words``."""
    starts = range(len(words) - len(part) + 1)
    return any(_same(words[start : start + len(part)], part) for start in starts)
