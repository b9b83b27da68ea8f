import dataclasses

import pytest
import torch

from fmn.concept import Concept, Prompt, parse_concept
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
        ForgetError, match="'person': choose one of identity, object, style, custom"
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


@pytest.mark.parametrize(
    "text, name, kind",
    [
        ("dog", "dog", "identity"),
        ("  dog ", "dog", "identity"),
        ("style:ink drawing", "ink drawing", "style"),
        (" style : ink drawing ", "ink drawing", "style"),
        ("object:dog: the film", "dog: the film", "object"),
        ("mission: impossible", "mission: impossible", "identity"),
    ],
)
def test_parse_concept(text, name, kind):
    assert parse_concept(text, "identity") == Concept(name, kind)


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
