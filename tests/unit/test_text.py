"""Text from outside, and articles."""

import pytest

from fmn.text import normalise, printable, with_article


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


@pytest.mark.parametrize(
    "text, expected",
    [
        ("van gogh", "van gogh"),
        (" van \u00a0\u3000\n gogh ", "van gogh"),
        ("e\u0301", "\u00e9"),
        ("\ufeffa\u200bb\u00adc\u200ed\u2060\x00", "abcd"),
        ("a\u200db", "ab"),
        ("\u0646\u200c\u0645", "\u0646\u200c\u0645"),  # Persian needs its non-joiner
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # and a family its joiner
        ("\u597d", "\u597d"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected == normalise(expected)
