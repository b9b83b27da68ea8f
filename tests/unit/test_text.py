"""Text from outside, and articles."""

import pytest

from fmn.text import printable, with_article


@pytest.mark.parametrize(
    "word, expected",
    [
        ("owl", "an owl"), ("kangaroo", "a kangaroo"), ("a man", "a man"), ("the sea", "the sea"),
        ("an anchor", "an anchor"), ("anchor", "an anchor"), ("Titian", "Titian"),
        ("Ada Lovelace", "Ada Lovelace"),
    ],
)  # fmt: skip
def test_articles(word, expected):
    assert with_article(word) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("dog 好", "dog 好"),
        ("\x1b[31mred", "?[31mred"),
        ("a\nb\tc", "a?b?c"),
        ("\u202eabc", "?abc"),
    ],
)
def test_control_characters_are_replaced(text, expected):
    assert printable(text) == expected
