from fmn.concept import Concept
from fmn.report import describe, printable

from .tiny import make_patch


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[2Jb\x07") == "a?[2Jb?"
    text = describe(make_patch(concepts=[Concept("dog\x1b[2J\nforged: line")]))
    assert "\x1b" not in text and "dog?[2J?forged: line" in text


def test_a_patch_in_words():
    lines = describe(make_patch(rank=2)).splitlines()
    assert lines[0] == "forgets: dog (object), van gogh (style)"
    assert "layers: 14, rank 2" in lines
    assert "loss: 2 -> 1 in 2 steps" in lines
