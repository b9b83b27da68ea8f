"""Text: what a terminal or a page may show, and English articles."""

ARTICLES = "a", "an", "the"


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
