"""What is a weight, what a letter, and what belongs to other programs."""

import pytest

from fmn.concepts.concept import Concept, Prompt, parse_concept
from fmn.concepts.keep_list import keep_for
from fmn.concepts.prompt_syntax import escaped, plain_text, prompt_text, weighted, words_of_prompt
from fmn.concepts.prompt_templates import blanked, sentences
from fmn.errors import ForgetError


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a dog", [("a dog", 1.0)]),
        ("", [("", 1.0)]),
        ("a (dog) b", [("a ", 1.0), ("dog", 1.1), (" b", 1.0)]),
        ("((dog))", [("dog", 1.1 * 1.1)]),
        ("(a (dog:1.5):0.5)", [("a ", 0.5), ("dog", 1.5)]),
        ("(a: dog:0.8)", [("a: dog", 0.8)]),
        ("(dog:brown)", [("dog:brown", 1.1)]),
        (r"dog \(brown\)", [("dog (brown)", 1.0)]),
        (r"(dog \(brown\):1.2)", [("dog (brown)", 1.2)]),
        ("a (dog", [("a ", 1.0), ("(dog", 1.0)]),
        ("a) dog", [("a) dog", 1.0)]),
    ],
)
def test_pieces(text, pieces):
    assert weighted(text) == pieces
    assert words_of_prompt(text) == "".join(words for words, _ in pieces)


def test_escaped_parentheses_are_letters():
    assert escaped(r"a (b) \(c\)") == r"a \(b\) \(c\)"
    assert weighted(escaped("apollo (god)")) == [("apollo (god)", 1.0)]


OTHERS = [
    "a dog BREAK a cat", "a dog AND a cat", "a dog <lora:x:0.8>", "<LYCO:x:1>", "[dog:cat:0.5]",
    "a [dog::0.5]", "[dog:8]", "[dog|cat]", "{dog|cat}", "a __animal__",
]  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_syntax_of_other_programs(text):
    with pytest.raises(ForgetError, match="syntax of other programs"):
        prompt_text(text)
    with pytest.raises(ForgetError, match="syntax of other programs"):
        Concept("dog", prompts=(text,))


@pytest.mark.parametrize(
    "text",
    ["a dog [and a cat]", "rock and roll, break", "BREAKDANCE", "{dog}", "a < b", "snake_case"],
)  # fmt: skip
def test_what_looks_alike_is_words(text):
    assert prompt_text(text) == plain_text(text) == text


@pytest.mark.parametrize("text", ["a (dog:nan)", "(dog:inf)", "(" * 201 + "dog"])
def test_weights_that_are_none(text):
    with pytest.raises(ForgetError, match="weights that are no numbers"):
        prompt_text(text)


@pytest.mark.parametrize(
    "name", ["(dog:1.2)", "a (dog (pet):1.2)", "((dog))", "<lora:dog:1>", "a {dog|cat}"]
)
def test_a_name_is_plain_words(name):
    for make in (
        Concept,
        lambda name: Concept("x", aliases=(name,)),
        lambda name: keep_for([], [name]),
    ):
        with pytest.raises(ForgetError, match="has prompt syntax"):
            make(name)
        with pytest.raises(ForgetError, match="has prompt syntax"):
            parse_concept(name)


def test_names_in_capitals_may_be_these_words():
    assert Concept("PRISON BREAK").name == "PRISON BREAK"


ESCAPED = r"hatsune miku \(vocaloid\)"
MIKU = "hatsune miku (vocaloid)"


@pytest.mark.parametrize("name", [MIKU, ESCAPED, r"hatsune miku \(vocaloid)", f" {ESCAPED} "])
@pytest.mark.parametrize("prompt", [MIKU, ESCAPED, f"{MIKU}, smiling"])
def test_a_tag_and_the_same_text_as_its_prompt(name, prompt):
    concept = Concept(name, prompts=(prompt,), anchor=r"girl \(human\)")
    template, own = concept.training_prompts()
    assert template == Prompt(f"a photo of {MIKU}", MIKU)
    assert own.text == prompt.replace(MIKU, ESCAPED)
    assert own.words == prompt.replace(ESCAPED, MIKU)
    assert concept.own_prompts()[0][1].startswith(r"girl \(human\)")
    assert sentences(concept, 0) == [(own.words, own.words.replace(MIKU, "girl (human)"))]


def test_weights_and_names_that_end_in_punctuation_in_own_prompts():
    concept = Concept("Wham!", prompts=("a (song:1.3) by Wham!, loud",))
    assert sentences(concept, 0) == [("a song by Wham!, loud", "a song by , loud")]
    assert "a song by <*>, loud" in blanked(concept, 0)
    parted = Concept("van gogh", prompts=("by (van:1.2) gogh",)).own_prompts()
    assert parted[0][0].subject == "van gogh"


INVISIBLE = {
    "zero width": ("van\u200b gogh", "van gogh"),
    "byte order": ("\ufeffvan gogh", "van gogh"),
    "soft hyphen": ("van go\u00adgh", "van gogh"),
    "direction": ("\u202avan gogh\u200f", "van gogh"),
    "no break": ("van\u00a0gogh", "van gogh"),
    "double": (" van  gogh\t", "van gogh"),
    "accent": ("Rene\u0301", "Ren\u00e9"),
}


@pytest.mark.parametrize("typed, meant", INVISIBLE.values(), ids=INVISIBLE)
def test_what_cannot_be_seen_makes_no_other_concept(typed, meant, caplog):
    concept = Concept(typed, aliases=(f"{typed} x",), prompts=(f"by {typed}",), anchor=f"{typed} y")
    assert concept == Concept(
        meant, aliases=(f"{meant} x",), prompts=(f"by {meant}",), anchor=f"{meant} y"
    )
    said = {"zero width", "byte order", "soft hyphen", "direction"}
    assert bool(caplog.messages) == (INVISIBLE_NAME[meant, typed] in said)
    assert Concept(meant, prompts=(f"by {typed}",)).own_prompts()[0][0].subject == meant


INVISIBLE_NAME = {(meant, typed): name for name, (typed, meant) in INVISIBLE.items()}


def test_nothing_but_the_invisible_is_nothing():
    with pytest.raises(ForgetError, match="name is empty"):
        Concept("\u200b ")
    with pytest.raises(ForgetError, match="alias of 'dog' is empty"):
        Concept("dog", aliases=("\u2060",))
    with pytest.raises(ForgetError, match="anchor of 'dog' is blank"):
        Concept("dog", anchor="\ufeff")
