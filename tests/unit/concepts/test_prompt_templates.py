"""Sentences about concepts, beside those about anchors, and about what is kept."""

import time
from collections import Counter

import pytest

from fmn.concepts.concept import Concept
from fmn.concepts.prompt_templates import (
    FRAMES,
    KEPT_FRAMES,
    SETTINGS,
    STRIDE,
    STYLE_FRAMES,
    THINGS,
    blanked,
    fill,
    kept_sentences,
    sentences,
    together,
)


def test_sentences_differ_only_in_the_name():
    concept = Concept("zebra", anchor="horse")
    pairs = sentences(concept, 180)
    assert len({text for text, _ in pairs}) == 180
    for text, other in pairs:
        assert text.count("zebra") == 1 and "{" not in text and "  " not in text
        assert other == text.replace("zebra", "horse")
    styles = sentences(Concept("monet", "style", anchor="photo"), 180)
    assert len({text for text, _ in styles}) == 180
    assert all(other == text.replace("monet", "photo") for text, other in styles)


def test_without_an_anchor_the_name_is_left_out():
    pairs = sentences(Concept("dog", prompts=("my Dog on grass",)), 3)
    assert pairs == [
        ("a photo of dog", "a photo of"),
        ("a painting of dog at the beach", "a painting of at the beach"),
        ("dog in a forest", "in a forest"),
        ("my Dog on grass", "my on grass"),
    ]


def test_aliases_follow_the_name_and_own_prompts_come_last():
    concept = Concept("dog", aliases=("red hound",), anchor="cat", prompts=("my dog on grass",))
    assert sentences(concept, 2) == [
        ("a photo of dog", "a photo of cat"),
        ("a painting of dog at the beach", "a painting of cat at the beach"),
        ("a photo of red hound", "a photo of cat"),
        ("a painting of red hound at the beach", "a painting of cat at the beach"),
        ("my dog on grass", "my cat on grass"),
    ]


def test_frames_and_settings_meet_once():
    for frames, others in ((FRAMES, SETTINGS), (STYLE_FRAMES, THINGS)):
        count = len(frames) * len(others)
        assert count >= 180
        assert len({(i % len(frames), i % len(others)) for i in range(count)}) == count


@pytest.mark.parametrize(
    "concept, gone",
    [
        (Concept("cat"), ["with a cat"]),
        (Concept("Cat"), ["with a cat"]),
        (Concept("lion", aliases=("red car", "child")), ["with a red car", "with a child"]),
        (Concept("the"), ["at the beach", "in the snow", "in the rain"]),
        (Concept("cat", anchor="dog"), ["with a cat"]),
        (Concept("lion", anchor="cat"), ["with a cat"]),
        (Concept("a"), [each for each in SETTINGS if " a " in each]),
    ],
)
def test_settings_that_hold_a_name_are_left_out(concept, gone):
    count = len(concept.subjects) * 180
    firsts = [text for text, _ in sentences(concept, 180)]
    assert len(firsts) == count
    for setting in filter(None, SETTINGS):
        assert any(text.endswith(f" {setting}") for text in firsts) == (setting not in gone)


def test_things_that_hold_a_style_are_left_out():
    texts = [text for text, _ in sentences(Concept("tree", "style", anchor="photo"), 180)]
    assert len(set(texts)) == 9 * 19  # all there are
    assert not any("a tree" in text for text in texts)
    assert any("a street in the rain" in text for text in texts)


def test_only_whole_words_count():
    texts = [text for text, _ in sentences(Concept("car"), 180)]
    assert any("with a cat" in text for text in texts)
    assert not any("with a red car" in text for text in texts)
    # "ca" is in "cat" and "car", but is neither.
    texts = [text for text, _ in sentences(Concept("ca"), 180)]
    assert any("with a cat" in text for text in texts)
    assert any("with a red car" in text for text in texts)


def test_characters_of_patterns_are_letters():
    assert len({text for text, _ in sentences(Concept("c++ (.*"), 180)}) == 180


def test_kept_sentences_word_by_word():
    styles = [f"style {i}" for i in range(7)]
    assert kept_sentences(["red fox", "tree"], styles, 8) == [
        "",
        "red fox",
        "a photo of a red fox",
        "a red fox, style 3",
        "style 1 of a red fox",
        "a tree in the style of style 6",
        "a picture of a tree, style 4",
        "tree",
        "a photo of a tree",
    ]
    assert STRIDE == 5


def test_words_together():
    words = ["red fox", "elm", "Ada Lovelace", "tree", "the sea"]
    assert together(words, 1) == words
    assert together(words, 2) == ["a red fox, a tree", "an elm, the sea", "Ada Lovelace"]
    assert together(words, 9) == ["a red fox, an elm, Ada Lovelace, a tree, the sea"]
    assert together([], 4) == []
    assert kept_sentences(together(words[:2], 2), ["ink"], 3) == [
        "", "a red fox, an elm", "a photo of a red fox, an elm", "a red fox, an elm, ink",
    ]  # fmt: skip


@pytest.mark.parametrize("words, count", [(3, 12), (5, 12), (12, 5), (300, 256), (2, 1)])
def test_kept_sentences_spread_evenly(words, count):
    words = [f"word{i}x" for i in range(words)]
    styles = [f"style{i}x" for i in range(9)]
    empty, *found = kept_sentences(words, styles, count)
    assert empty == "" and len(found) == count and all(found)
    used = [[word for word in words if word in text] for text in found]
    assert all(len(each) == 1 for each in used)
    order = [words.index(each[0]) for each in used]
    assert order == sorted(order)
    times = Counter(order)
    assert max(times.values()) - min(times.values()) <= 1
    assert len(times) == min(len(words), count)
    # From the beginning of the list to its end, whatever the count.
    gaps = [b - a for a, b in zip(order, order[1:])]
    assert all(gap in (len(words) // count, -(-len(words) // count)) for gap in gaps)


def test_kept_sentences_hold_nothing_but_what_was_given():
    words, styles = ["owl", "elm"], ["ink", "oil", "wax"]
    frames = " ".join(KEPT_FRAMES).replace("{}", " ").replace("{0}", " ").replace("{1}", " ")
    allowed = {*words, *styles, "an", *frames.replace(",", " ").split()}
    found = kept_sentences(words, styles, 60)
    assert {word for text in found for word in text.replace(",", " ").split()} == allowed
    for text in found:
        assert "{" not in text and sum(style in text for style in styles) <= 1


def test_without_styles_there_are_only_frames_without_one():
    assert kept_sentences(["owl", "elm"], [], 4) == [
        "", "owl", "a photo of an owl", "elm", "a photo of an elm",
    ]  # fmt: skip


def test_every_style_has_its_turn():
    """Also where the stride divides their number."""
    styles = [f"style{i}x" for i in range(2 * STRIDE)]
    found = kept_sentences(["owl"], styles, 12 * len(styles))
    assert all(any(style in text for text in found) for style in styles)


def test_nothing_to_keep():
    assert kept_sentences([], ["ink"], 5) == [""]
    assert kept_sentences([], [], 5) == [""]
    assert kept_sentences(["owl"], ["ink"], 0) == [""]


def test_blanked_prompts():
    """The template, the own prompts without any name, then sentences from the lists."""
    own = (
        "my Hot DOG on grass",
        "dog, another Dog and a dogma",
        "hotdogs",
        "a HOUND",
        "one dog rose",
    )
    concept = Concept("dog", aliases=("hot dog", "hound", "dog rose"), prompts=own)
    assert blanked(concept, 2) == (
        "a photo of <*>",
        "my <*> on grass",  # not "my Hot <*>"
        "<*>, another <*> and a dogma",
        "a <*>",
        "one <*>",  # not "one <*> rose"
        "a painting of <*> at the beach",  # the first sentence is the template
    )
    assert blanked(concept, 0) == blanked(concept, 1) == blanked(concept, 2)[:5]


@pytest.mark.parametrize(
    "concept, expected",
    [
        (Concept("ink", "style"), ("a photo in the style of <*>", "a painting of a house by <*>")),
        (Concept("ink", "custom", prompts=("in ink",)), ("<*>", "in <*>", "a photo of <*>")),
        (Concept("dog", prompts=("my dog", "my Dog")), ("a photo of <*>", "my <*>")),
        (Concept("a.c", prompts=("my abc a.c",)), ("a photo of <*>", "my abc <*>")),
    ],
)
def test_blanked_prompts_of_other_kinds(concept, expected):
    assert blanked(concept, 1) == expected


def test_blanked_sentences_leave_out_what_names_the_concept():
    found = blanked(Concept("cat"), 180)
    assert len(found) == len(set(found)) == 180 and all(text.count("<*>") == 1 for text in found)
    assert not any("cat" in text for text in found)


def test_all_unsafe_terms_take_no_time():
    begin = time.monotonic()
    pairs = sentences(Concept("unsafe", "unsafe", anchor="people talking"), 180)
    assert time.monotonic() - begin < 1
    assert len(pairs) > 90 * 180


def test_other_braces_of_a_template_stay():
    assert fill("a {big} photo of {}, {0}", "a {dog}") == "a {big} photo of a {dog}, {0}"
