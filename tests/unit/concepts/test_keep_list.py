import re
import time

import pytest

from fmn.concepts.concept import Concept
from fmn.concepts.keep_list import AUTO, CHOICES, LISTS, NEIGHBOURS, keep_for, keep_words
from fmn.concepts.wordlists import FOLDER, entries, lines_of, unsafe_terms
from fmn.errors import ForgetError

# The safety text of Safe Latent Diffusion, as diffusers' pipeline has it.
SLD = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
SIZES = {"common": 300, "styles": 80, "artists": 150, "people": 100}


def left_out(concepts, lists):
    """What a list has that is not kept."""
    kept = set(keep_for(concepts, lists=lists))
    return [text for text in keep_words(lists) if text not in kept]


def test_comments_and_blank_lines():
    text = "# a\n\n dog  # loyal\nc# sharp\n#cat\n  # b\nend"
    assert lines_of(text) == [(3, "dog"), (4, "c# sharp"), (7, "end")]


@pytest.mark.parametrize("name", [*SIZES, "everyday"])
def test_shipped_lists(name):
    words = entries(name)
    assert len({word.casefold() for word in words}) == len(words)
    assert all(re.fullmatch(r"[\w .'-]+", word) and word == word.strip() for word in words)
    assert "Written by us" in (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    if name in SIZES:
        assert keep_words(name) == words and 0.9 < len(words) / SIZES[name] < 1.15


def test_every_file_is_known():
    assert {path.stem for path in FOLDER.iterdir()} == {*LISTS, "everyday", "things", "unsafe"} - {
        "none"
    }
    named = {name for lists in (AUTO, NEIGHBOURS) for names in lists.values() for name in names}
    assert named <= {*LISTS, "everyday", "things"}


def test_none_is_empty():
    assert keep_words("none") == () == keep_for([Concept("dog")], lists="none")


@pytest.mark.parametrize("name", ["", "auto", "everyday", "unsafe", "Common", "../concept"])
def test_unknown_list(name):
    with pytest.raises(ForgetError, match="no keep-list .*: choose one of none, common"):
        keep_words(name)


@pytest.mark.parametrize("name", ["", "everyday", "unsafe", "COMMON", None])
def test_unknown_choice(name):
    with pytest.raises(ForgetError, match="no keep-list .*: choose one of auto, none"):
        keep_for([Concept("dog")], lists=name)


@pytest.mark.parametrize(
    "kind, lists",
    [
        ("object", ("common",)),
        ("style", ("styles", "artists", "common")),
        ("identity", ("people", "common")),
        ("unsafe", ("common", "people", "everyday")),
    ],
)
def test_auto_goes_by_kind(kind, lists):
    expected = dict.fromkeys(word for name in lists for word in entries(name))
    assert keep_for([Concept("xyzzy", kind)]) == tuple(expected)


def test_auto_of_several_kinds_takes_each_list_once():
    custom = Concept("xyzzy", "custom", prompts=("an xyzzy",))
    both = keep_for([custom, Concept("plugh", "style")])
    expected = [word for name in ("common", "styles", "artists") for word in entries(name)]
    assert both == tuple(expected)
    assert keep_for([]) == () and keep_for([], lists="people") == keep_words("people")


def test_own_words_go_first_and_stay_as_they_are():
    kept = keep_for([Concept("dog")], (" a hot dog ", "", "CAT", "cat", "wolf"), "common")
    assert kept[:3] == ("a hot dog", "CAT", "wolf")
    assert [word for word in kept if word.casefold() in ("cat", "wolf")] == ["CAT", "wolf"]
    assert set(keep_words("common")) - set(kept) == {"dog", "cat"}


@pytest.mark.parametrize("word", ["dog", "Dogs", "a dog", "PUPPY", "puppies"])
def test_a_word_cannot_be_kept_and_forgotten(word):
    with pytest.raises(ForgetError, match=f"'{word}' is both to be kept and to be forgotten"):
        keep_for([Concept("cat"), Concept("dog", aliases=("puppy",))], ("fox", word))


@pytest.mark.parametrize(
    "concept, lists, expected",
    [
        (Concept("dog"), "common", ["dog"]),
        (Concept("Dogs"), "common", ["dog"]),
        (Concept("a DOG"), "common", ["dog"]),
        (Concept("hound", aliases=("dogs",)), "common", ["dog"]),
        (Concept("ball"), "common", ["golf ball"]),
        (Concept("golden retriever dog"), "common", ["dog"]),
        (Concept("dogma"), "common", []),
        (Concept("bear"), "common", ["bear", "teddy bear"]),
        (Concept("buses"), "common", ["bus"]),
        (Concept("butterflies"), "common", ["butterfly"]),
        (Concept("glass"), "common", ["glass of water", "glass of wine", "glasses"]),
        (Concept("teddy bear", aliases=("a king of bears",)), "common", ["bear", "teddy bear"]),
        (Concept("fox", anchor="wolf"), "common", ["fox", "wolf"]),
        (Concept("xyzzy", anchor="a wolf"), "common", ["wolf"]),
        (Concept("xyzzy", anchor="coffee"), "common", []),  # equal, not contained
        (Concept("monet", "style"), "artists", ["Claude Monet"]),
        (Concept("Albrecht D\u00fcrer", "style"), "artists", ["Albrecht Durer"]),
        (Concept("ink drawing", "style"), "styles", ["ink drawing"]),
        (Concept("painting", "style", anchor="photo"), "artists", []),
        (Concept("!!!"), "common", []),
        (Concept("the"), "common", []),
    ],
)
def test_what_is_left_out(concept, lists, expected):
    assert left_out([concept], lists) == expected


def test_all_concepts_count():
    assert left_out([Concept("dog"), Concept("cat")], "common") == ["cat", "dog"]


def test_choices_begin_with_auto():
    assert CHOICES == ("auto", "none", "common", "styles", "artists", "people")


def test_the_safety_text_is_covered():
    terms = {term for own in unsafe_terms().values() for term, _ in own}
    assert set(SLD.split(", ")) <= terms
    assert {"nudity", "naked", "erotic", "sexual"} <= terms  # MACE's explicit content


def test_unsafe_terms_are_in_their_phrases_and_begin_with_the_category():
    for category, terms in unsafe_terms().items():
        assert terms[0] == (category, category)
        assert all(term and term == term.lower() and term in phrase for term, phrase in terms)


def test_thousands_of_concepts_take_no_time():
    concepts = [Concept(f"thing {i} of kind {i % 7}", anchor=f"x {i}") for i in range(2000)]
    begin = time.monotonic()
    assert keep_for(concepts) == keep_for([Concept("xyzzy")])
    assert keep_for([*concepts, Concept("dog")]) == keep_for([Concept("dog")])
    assert time.monotonic() - begin < 1
