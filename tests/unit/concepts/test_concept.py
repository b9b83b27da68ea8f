import dataclasses

import pytest
import torch

from fmn.concepts.concept import Concept, Prompt, parse_concept
from fmn.errors import ForgetError


@pytest.mark.parametrize(
    "kind, text",
    [
        ("identity", "a photo of elon musk"),
        ("object", "a photo of elon musk"),
        ("style", "a photo in the style of elon musk"),
    ],
)
def test_released_templates(kind, text):
    assert Concept("elon musk", kind).training_prompts() == [Prompt(text, "elon musk", plain=True)]


def test_aliases_fill_the_template_too():
    prompts = Concept("dog", aliases=("puppy", "hound")).training_prompts()
    assert [tuple(prompt) for prompt in prompts] == [
        ("a photo of dog", "dog", True),
        ("a photo of puppy", "puppy", True),
        ("a photo of hound", "hound", True),
    ]


def test_names_with_braces_are_text():
    assert Concept("{} {0}").training_prompts()[0].text == "a photo of {} {0}"


def test_own_prompts_come_after_the_template():
    concept = Concept("dog", prompts=("(a dog:1.2) in snow",))
    assert concept.training_prompts() == [
        Prompt("a photo of dog", "dog", plain=True),
        Prompt("(a dog:1.2) in snow", "dog", plain=False),
    ]


def test_custom_has_no_template():
    concept = Concept("dog", "custom", prompts=("walking the dog",))
    assert concept.training_prompts() == [Prompt("walking the dog", "dog", plain=False)]


@pytest.mark.parametrize(
    "text, subject",
    [
        ("a portrait of van gogh", "van gogh"),
        ("a portrait of vincent van gogh", "vincent van gogh"),  # contains the name
        ("A Portrait Of VAN GOGH", "van gogh"),
        ("a gogh-like sky", "gogh"),
    ],
)
def test_own_prompt_takes_the_longest_subject(text, subject):
    concept = Concept("van gogh", "style", aliases=("gogh", "vincent van gogh"), prompts=(text,))
    assert concept.training_prompts()[-1].subject == subject


def test_own_prompt_without_the_concept():
    concept = Concept("dog", aliases=("puppy",), prompts=("a cat",))
    with pytest.raises(ForgetError, match="'a cat' does not contain the concept 'dog'"):
        concept.training_prompts()


@pytest.mark.parametrize("name", ["", "   ", "\n\t"])
def test_empty_name(name):
    with pytest.raises(ForgetError, match="name is empty"):
        Concept(name)


def test_unknown_kind():
    with pytest.raises(
        ForgetError, match="'person': choose one of identity, object, style, unsafe, custom"
    ):
        Concept("dog", "person")


def test_custom_without_prompts():
    with pytest.raises(ForgetError, match="add at least one prompt"):
        Concept("dog", "custom")


def test_concepts_are_values():
    one = Concept("dog", images=torch.zeros(1, 2, 2, 3))
    assert one == Concept("dog", images=torch.ones(1, 2, 2, 3)) != Concept("dog", "identity")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "cat"


def test_describe_leaves_out_pictures():
    concept = Concept("dog", aliases=("puppy",), prompts=("a dog",), images=torch.zeros(1))
    assert concept.describe() == {
        "name": "dog", "kind": "object", "aliases": ["puppy"], "prompts": ["a dog"],
    }  # fmt: skip
    assert Concept("dog", anchor="cat").describe() == {
        "name": "dog", "kind": "object", "aliases": [], "prompts": [], "anchor": "cat",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text, name, kind",
    [
        ("dog", "dog", "identity"),
        ("  dog ", "dog", "identity"),
        ("style:ink drawing", "ink drawing", "style"),
        (" style : ink drawing ", "ink drawing", "style"),
        ("object:dog: the film", "dog: the film", "object"),
        ("object:mission: impossible", "mission: impossible", "object"),
        ("two words: a film", "two words: a film", "identity"),
        (":dog", ":dog", "identity"),
    ],
)
def test_parse_concept(text, name, kind):
    assert parse_concept(text, "identity") == Concept(name, kind)


@pytest.mark.parametrize("text", ["person:elon musk", " mission : impossible"])
def test_a_word_that_is_no_kind(text):
    word = text.split(":")[0].strip()
    with pytest.raises(
        ForgetError, match=f"^'{word}' is not a kind: use identity, .* 'style:{word}"
    ):
        parse_concept(text, "style")


@pytest.mark.parametrize("text", ["", " ", "style:"])
def test_parse_nothing(text):
    with pytest.raises(ForgetError, match="name is empty"):
        parse_concept(text)


def test_custom_kind_with_its_prompts_is_parsed():
    concept = parse_concept("custom:dog", prompts=("a dog runs",))
    assert [prompt.text for prompt in concept.training_prompts()] == ["a dog runs"]


def test_an_empty_alias_is_refused():
    with pytest.raises(ForgetError, match="An alias of 'dog' is empty"):
        Concept("dog", aliases=(" ",))


def test_escaped_parentheses_name_the_concept():
    (_, prompt) = Concept(
        "apollo (god)", prompts=(r"a temple of apollo \(god\)",)
    ).training_prompts()
    assert prompt.subject == "apollo (god)" and not prompt.plain


DOG = Concept("dog", aliases=("puppy",), prompts=("A (Dog:1.2) and a puppy",), anchor="cat")


def test_anchored_prompts_hold_the_anchor_in_place_of_the_concept():
    assert DOG.anchored_prompts() == [
        (Prompt("a photo of dog", "dog"), "a photo of cat"),
        (Prompt("a photo of puppy", "puppy"), "a photo of cat"),
        (Prompt("A (Dog:1.2) and a puppy", "puppy", plain=False), "A (cat:1.2) and a cat"),
    ]


def test_bare_prompts_are_names_alone_and_then_own_prompts():
    assert DOG.bare_prompts() == [
        (Prompt("dog", "dog"), "cat"),
        (Prompt("puppy", "puppy"), "cat"),
        (Prompt("A (Dog:1.2) and a puppy", "puppy", plain=False), "A (cat:1.2) and a cat"),
    ]


def test_without_an_anchor_there_is_the_empty_prompt():
    dog = dataclasses.replace(DOG, anchor="")
    assert [text for _, text in dog.anchored_prompts()] == ["", "", ""]
    assert [text for _, text in dog.bare_prompts()] == ["", "", ""]
    assert [prompt for prompt, _ in dog.anchored_prompts()] == dog.training_prompts()


def test_a_style_keeps_its_template_and_custom_has_only_own_prompts():
    style = Concept("van gogh", "style", anchor="painting")
    assert style.anchored_prompts()[0][1] == "a photo in the style of painting"
    custom = Concept("dog", "custom", prompts=("walking the dog",), anchor="cat")
    own = Prompt("walking the dog", "dog", plain=False), "walking the cat"
    assert custom.anchored_prompts() == [own]
    assert custom.bare_prompts() == [(Prompt("dog", "dog"), "cat"), own]


@pytest.mark.parametrize(
    "name, aliases, text, anchored",
    [
        ("dog", (), "DOG, Dog, dog", "cat, cat, cat"),
        ("dog", (), "a dog at a dogfight", "a cat at a dogfight"),  # whole words only
        ("dog", (), "dogs in snow", "cats in snow"),  # unless there are none
        ("\u72d7", (), "\u4e00\u53ea\u72d7\u8dd1", "\u4e00\u53eacat\u8dd1"),  # no spaces
        ("gogh", ("vincent van gogh",), "by Vincent van Gogh", "by cat"),
        ("apollo (god)", (), r"a temple of Apollo \(god\)", "a temple of cat"),
        ("apollo (god)", (), "a temple of apollo (god)", "a temple of cat"),
        ("c++ {}", (), "a c++ {} book", "a cat book"),
    ],
)
def test_what_the_anchor_replaces_in_own_prompts(name, aliases, text, anchored):
    concept = Concept(name, aliases=aliases, prompts=(text,), anchor="cat")
    assert concept.anchored_prompts()[-1][1] == anchored


def test_an_anchor_is_literal():
    concept = Concept("dog", prompts=("my dog",), anchor=r"a \1 (grey) {} cat")
    made, own = (text for _, text in concept.anchored_prompts())
    assert made == r"a photo of a \1 (grey) {} cat"
    assert own == r"my a \1 \(grey\) {} cat"  # parentheses are weights in own prompts


@pytest.mark.parametrize("anchor", ["dog", "DOG", " dog ", "Puppy"])
def test_an_anchor_that_is_to_be_forgotten(anchor):
    with pytest.raises(ForgetError, match="which is to be forgotten"):
        Concept("dog", aliases=("puppy",), anchor=anchor)


def test_a_blank_anchor():
    with pytest.raises(ForgetError, match="anchor of 'dog' is blank"):
        Concept("dog", anchor="  ")


def test_an_anchor_that_finds_no_place():
    # Lowered, the dotted capital is two letters, so it is found but cannot be replaced.
    concept = Concept("i\u0307zmir", prompts=("\u0130zmir",), anchor="town")
    with pytest.raises(ForgetError, match="'town' finds no place in the prompt"):
        concept.anchored_prompts()


@pytest.mark.parametrize(
    "text, name, kind, anchor",
    [
        ("dog -> cat", "dog", "object", "cat"),
        ("dog->cat", "dog", "object", "cat"),
        ("style : van gogh ->  a painting ", "van gogh", "style", "a painting"),
        ("identity:dog: the film -> style: none", "dog: the film", "identity", "style: none"),
        ("unsafe:nudity", "nudity", "unsafe", ""),
    ],
)
def test_parse_anchor(text, name, kind, anchor):
    concept = parse_concept(text)
    assert (concept.name, concept.kind, concept.anchor) == (name, kind, anchor)


def test_the_text_goes_before_a_given_anchor():
    assert parse_concept("dog -> cat", anchor="fox").anchor == "cat"
    assert parse_concept("dog", anchor="fox").anchor == "fox"


@pytest.mark.parametrize(
    "text, message",
    [
        ("dog ->", "nothing after '->'"),
        ("dog -> ", "nothing after '->'"),
        ("dog -> cat -> fox", "more than one '->'"),
        ("-> cat", "name is empty"),
        ("style: -> cat", "name is empty"),
        ("dog -> Dog", "to be forgotten"),
    ],
)
def test_parse_bad_anchors(text, message):
    with pytest.raises(ForgetError, match=message):
        parse_concept(text)


def test_an_unsafe_category_stands_for_its_terms():
    concept = Concept("Nudity", "unsafe", aliases=("in the buff", "NAKED"), anchor="a coat")
    assert concept.subjects[:3] == ("nudity", "nude", "naked")
    assert concept.subjects[-1] == "in the buff" and concept.subjects.count("naked") == 1
    prompts = concept.anchored_prompts()
    assert prompts[0] == (Prompt("a photo of nudity", "nudity"), "a photo of a coat")
    assert prompts[2] == (Prompt("a photo of a naked person", "naked"), "a photo of a coat")
    assert prompts[-1][0] == Prompt("a photo of in the buff", "in the buff")
    assert concept.bare_prompts()[2] == (Prompt("naked", "naked"), "a coat")


def test_unsafe_is_every_category():
    every = Concept("unsafe", "unsafe").subjects
    for category in ("nudity", "violence", "gore", "hate", "drugs", "self-harm", "crime"):
        own = Concept(category, "unsafe").subjects
        assert own[0] == category and set(own) <= set(every)
    assert len(set(every)) == len(every)


def test_another_unsafe_name_is_a_term_of_its_own():
    concept = Concept("smoking", "unsafe")
    assert concept.subjects == ("smoking",)
    assert concept.training_prompts() == [Prompt("a photo of smoking", "smoking")]


@pytest.mark.parametrize("anchor", ["naked", "Nudity", "unsafe"])
def test_an_unsafe_anchor(anchor):
    with pytest.raises(ForgetError, match="to be forgotten"):
        Concept("unsafe", "unsafe", anchor=anchor)


def test_a_category_is_a_name_in_other_kinds():
    assert Concept("nudity").subjects == ("nudity",)


def test_own_prompt_of_a_category_names_its_terms():
    concept = Concept("nudity", "unsafe", prompts=("a beach",))
    with pytest.raises(ForgetError, match="write 'nudity' or 'nude' or 'naked' into it"):
        concept.training_prompts()
