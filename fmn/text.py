"""Text from outside, made fit for a terminal and a page."""


def printable(text):
    """Text from a stranger without control characters, which a terminal would obey."""
    if text.isprintable():  # nearly always, and much faster
        return text
    return "".join(letter if letter.isprintable() else "?" for letter in text)
