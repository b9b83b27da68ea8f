"""A concept to forget, and the prompts that name it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ForgetError
from ..text import INVISIBLE, normalise
from .prompt_syntax import escaped, plain_text, prompt_text, unescaped, words_of_prompt
from .wordlists import unsafe_terms

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("identity", "object", "style", "unsafe", "custom")

# The two templates of the released Forget-Me-Not code (SHI-Labs/Forget-Me-Not, train_attn.py);
# identities and unsafe content use the object's.
TEMPLATES = {
    "identity": "a photo of {}",
    "object": "a photo of {}",
    "style": "a photo in the style of {}",
    "unsafe": "a photo of {}",
}
ARROW = "->"
MARK = re.compile(r"^\s*[-*\u2022\u2013\u2014]\s+")
SEVERAL = re.compile(r";\s|\s;|;$|;.*;")  # "Steins;Gate" is one name

log = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """A prompt and the words in it that name the concept."""

    text: str
    subject: str
    plain: bool = True  # the text is literal: parentheses are not weights

    @property
    def words(self) -> str:
        """The text as it is read, without weights."""
        return unescaped(self.text) if self.plain else words_of_prompt(self.text)


@dataclass(frozen=True)
class Concept:
    """One thing to forget. Its texts are normalised: see ``prompt_syntax``.

    Attributes:
        name: the words that summon it, as users type them. For kind ``unsafe`` a category of
            ``lists/unsafe.txt``, which stands for the terms listed there, or "unsafe" for all of
            them; any other name is a term of its own.
        kind: one of ``KINDS``; picks the prompt template. ``custom`` has none and needs prompts.
        aliases: other words for the same thing, forgotten along with the name.
        prompts: further prompts to train on; each must contain the name or an alias. They may use
            weights; the parentheses of a name in them are letters.
        images: reference pictures, float [N, H, W, 3] in 0..1, or None.
        anchor: what is drawn instead; "" is nothing. Methods without a target ignore it.
        learned: input embeddings that summon it too, each float [k, width]: what an attack found.
            Closed forms on cross-attention's input forget them along with the name.
    """

    name: str
    kind: str = "object"
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    images: Tensor | None = field(default=None, compare=False, repr=False)
    anchor: str = ""
    learned: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        self._normalise()
        if not self.name:
            raise ForgetError("The concept's name is empty: type the words to forget.")
        if SEVERAL.search(self.name):
            raise ForgetError(
                f"'{self.name:.80}' looks like several names: give each concept its own line or "
                "argument; other words for the same thing go behind it, as in 'dog | puppy'."
            )
        if not all(self.aliases):
            raise ForgetError(f"An alias of '{self.name}' is empty: type a name or remove it.")
        if self.kind not in KINDS:
            raise ForgetError(f"Unknown kind '{self.kind}': choose one of {', '.join(KINDS)}.")
        if self.kind == "custom" and not self.prompts:
            raise ForgetError(
                f"Concept '{self.name}' is of kind custom, which has no prompt template: "
                "add at least one prompt that contains it, or choose another kind."
            )
        forgotten = {words.casefold() for words in (self.name, *self.subjects)}
        if self.anchor.casefold() in forgotten:
            raise ForgetError(
                f"The anchor of '{self.name}' is '{self.anchor}', which is to be forgotten: type "
                "something else to draw instead, or leave it empty for nothing."
            )

    def _normalise(self) -> None:
        if self.anchor and not plain_text(self.anchor):
            raise ForgetError(
                f"The anchor of '{self.name}' is blank: type what is drawn instead, or leave it "
                "empty for nothing."
            )
        if any(map(INVISIBLE.search, (self.name, self.anchor, *self.aliases, *self.prompts))):
            log.warning("'%s': invisible characters are left out.", plain_text(self.name))
        texts = {
            "name": plain_text(self.name),
            "kind": self.kind.strip().lower(),
            "aliases": tuple(map(plain_text, self.aliases)),
            "prompts": tuple(map(prompt_text, self.prompts)),
            "anchor": plain_text(self.anchor),
        }
        for name, text in texts.items():
            object.__setattr__(self, name, text)  # frozen

    @property
    def subjects(self) -> tuple[str, ...]:
        """All words to forget: the name (for an unsafe category its terms), then the aliases."""
        return tuple(subject for subject, _ in self._phrases())

    def _phrases(self) -> list[tuple[str, str]]:
        """(subject, its phrase in a template); they differ only for terms of unsafe categories."""
        if self.kind != "unsafe":
            return [(subject, subject) for subject in (self.name, *self.aliases)]
        unique: dict[str, tuple[str, str]] = {}
        for term, phrase in (*_terms(self.name), *zip(self.aliases, self.aliases)):
            unique.setdefault(term.casefold(), (term, phrase))
        return list(unique.values())

    def training_prompts(self) -> list[Prompt]:
        """The template filled with the name and every alias, then the concept's own prompts."""
        return [prompt for prompt, _ in self.anchored_prompts()]

    def anchored_prompts(self) -> list[tuple[Prompt, str]]:
        """Each training prompt with the text that holds the anchor instead: [(Prompt, str)].

        The text is "" where there is no anchor. It is read as the prompt is: literally if
        ``Prompt.plain``. In own prompts every name and alias is replaced.
        """
        if self.kind not in TEMPLATES:
            return self.own_prompts()
        template = TEMPLATES[self.kind]
        anchored = self.anchor and template.format(self.anchor)
        made = [(Prompt(template.format(text), name), anchored) for name, text in self._phrases()]
        return made + self.own_prompts()

    def bare_prompts(self) -> list[tuple[Prompt, str]]:
        """What closed forms edit: the name and the aliases alone, each with the anchor alone,
        then the concept's own prompts as in ``anchored_prompts``: [(Prompt, str)]."""
        alone = [(Prompt(subject, subject), self.anchor) for subject in self.subjects]
        return alone + self.own_prompts()

    def own_prompts(self) -> list[tuple[Prompt, str]]:
        """The concept's own prompts as in ``anchored_prompts``."""
        return [(self._own(text), self.anchor and self._swapped(text)) for text in self.prompts]

    def _own(self, text: str) -> Prompt:
        # Longest first, so that an alias that contains the name is taken whole.
        for subject in sorted(self.subjects, key=len, reverse=True):
            name = _escaped_or_not(subject)
            read = re.sub(name, lambda match: escaped(match[0]), text, flags=re.IGNORECASE)
            if subject.lower() in words_of_prompt(read).lower():
                return Prompt(read, subject, plain=False)
        words = " or ".join(f"'{subject}'" for subject in self.subjects[:3])
        raise ForgetError(
            f"The prompt '{text}' does not contain the concept '{self.name}': "
            f"write {words} into it, or remove the prompt."
        )

    def _swapped(self, text: str) -> str:
        """An own prompt with the anchor for every subject; the rest of it stays."""
        longest_first = sorted(self.subjects, key=len, reverse=True)
        either = "|".join(_escaped_or_not(subject) for subject in longest_first)
        anchor = escaped(self.anchor)
        # Whole words if there are any; "dogs", or a script without spaces, has none.
        for pattern in (rf"(?<!\w)(?:{either})(?!\w)", either):
            swapped, count = re.subn(pattern, lambda match: anchor, text, flags=re.IGNORECASE)
            if count:
                return swapped
        raise ForgetError(
            f"The anchor '{self.anchor}' finds no place in the prompt '{text}': spell the concept "
            f"as in '{self.name}', or remove the prompt."
        )

    def describe(self) -> dict[str, Any]:
        """What a patch file says of the concept: everything but the pictures."""
        lists = {"aliases": list(self.aliases), "prompts": list(self.prompts)}
        anchor = {"anchor": self.anchor} if self.anchor else {}
        return {"name": self.name, "kind": self.kind} | lists | anchor


def parse_concept(text: str, kind: str = "object", **more: Any) -> Concept:
    """Read ``KIND:NAME | ALIAS | ALIAS -> ANCHOR``, all but the name optional.

    For example ``style:ink drawing | pen drawing -> photo``. ``more`` goes to ``Concept``; what the
    text says goes first. A list's mark before it ("- ", "* ", "\u2022 ") is left out.

    Raises:
        ForgetError: a word before a colon is not a kind, or the arrow points to nothing.
    """
    plain_text(text)  # before {a|b} is cut
    text, arrow, anchor = MARK.sub("", text).partition(ARROW)
    if arrow:
        if not anchor.strip() or ARROW in anchor:
            what = "more than one" if anchor.strip() else "nothing after"
            raise ForgetError(
                f"'{text}{arrow}{anchor:.200}' has {what} '{ARROW}': write 'dog {ARROW} cat', or "
                "only 'dog' to draw nothing instead."
            )
        more["anchor"] = anchor.strip()
    text, *aliases = text.split("|")
    if aliases:
        more["aliases"] = (*(alias.strip() for alias in aliases), *more.get("aliases", ()))
    kind, name = kind_and_name(text, kind)
    return Concept(name, kind, **more)


def kind_and_name(text: str, kind: str) -> tuple[str, str]:
    """Read ``KIND:NAME``, or the name alone, which is of the kind given: (kind, name).

    Raises:
        ForgetError: one word stands before the first colon, and is not a kind; or it has weights.
    """
    plain_text(text)  # the colon of a weight is no kind's
    prefix, colon, name = text.partition(":")
    prefix = normalise(prefix)
    if not colon or len(prefix.split()) != 1:
        return kind, text.strip()
    if prefix.lower() in KINDS:
        return prefix.lower(), name.strip()
    reverse = name.strip().lower()
    if reverse in KINDS:
        raise ForgetError(f"The kind comes first: write '{reverse}:{prefix:.60}'.")
    raise ForgetError(
        f"'{prefix:.60}' is not a kind: use {', '.join(KINDS)}; a name with a colon needs a "
        f"kind before it, as in '{kind}:{text.strip():.60}'."
    )


def _terms(name: str) -> tuple[tuple[str, str], ...]:
    """((term, phrase), ...) of an unsafe category, or the name itself."""
    known = unsafe_terms()
    category = re.sub(r"[\s_]+", "-", name.strip().casefold())
    if category == "unsafe":
        return tuple(chain.from_iterable(known.values()))
    return known.get(category, ((name, name),))


def _escaped_or_not(subject: str) -> str:
    """A pattern for the subject in a prompt, where its parentheses may have a backslash."""
    return "".join(rf"\\?{re.escape(c)}" if c in "()" else re.escape(c) for c in subject)
