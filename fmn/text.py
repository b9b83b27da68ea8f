"""Text: what a terminal or a page may show, what nobody can see, and English articles."""

import re
import unicodedata

ARTICLES = "a", "an", "the"

# Zero width, soft hyphens, marks of direction and byte order, controls; joiners only where they do
# not join emoji or the letters of scripts that need them.
INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb]|(?<![^\x00-\u02ff])[\u200c\u200d]"
)


def normalise(text: str) -> str:
    """Text as it looks: composed accents (NFC), single spaces, nothing that cannot be seen.

    CLIP's tokenizer composes accents and joins spaces too, but reads zero width as letters.
    """
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", text)).split())


def printable(text: str) -> str:
    """Untrusted text with ? for each control character, which a terminal would obey."""
    if text.isprintable():  # nearly always, and much faster
        return text
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def with_article(word: str) -> str:
    """The word with a or an, unless it begins with an article or, as a name, with a capital."""
    if word[0].isupper() or word.split()[0] in ARTICLES:
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
