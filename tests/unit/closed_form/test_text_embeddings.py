"""Which rows of encoded prompts closed forms work on."""

import pytest
import torch

from fmn.closed_form.text_embeddings import (
    OBJECT_TEMPLATES,
    concept_pairs,
    end_pairs,
    kept_contexts,
)
from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.models.token_positions import EOS_ID

from ..tiny import TinyModel

PADS = pytest.mark.parametrize("pad", [EOS_ID, 0])  # Stable Diffusion 1.x, and 2.x and XL


def encoded(model, text):
    return model.encode(Prompt(text, text)).context[0].double()


@PADS
@pytest.mark.parametrize(
    ("tokens", "rows", "anchors"),
    [
        # BOS red dog EOT ...            BOS a house boat EOT ...
        ("last", [2], [3]),
        ("subject", [1, 2], [2, 3]),
        ("from-last", list(range(2, 77)), [*range(3, 77), 76]),
        ("all", list(range(1, 77)), [2, 3, *range(4, 77), 76]),
    ],
)
def test_tokens_stand_beside_their_anchors(pad, tokens, rows, anchors):
    model = TinyModel(pad)
    pairs = concept_pairs(model, [Concept("red dog", anchor="a house boat")], tokens)[0]
    assert pairs.targets.equal(encoded(model, "red dog")[rows])
    assert pairs.anchors.equal(encoded(model, "a house boat")[anchors])


@PADS
@pytest.mark.parametrize(
    ("tokens", "rows", "anchors"),
    [
        ("last", [2], [0]),
        ("subject", [1, 2], [0, 0]),
        ("from-last", list(range(2, 77)), list(range(75))),
        ("all", list(range(1, 77)), [0, *range(75)]),
    ],
)
def test_no_anchor_is_the_empty_prompt_from_its_start(pad, tokens, rows, anchors):
    model = TinyModel(pad)
    pairs = concept_pairs(model, [Concept("red dog")], tokens)[0]
    assert pairs.targets.equal(encoded(model, "red dog")[rows])
    assert pairs.anchors.equal(encoded(model, "")[anchors])


def test_a_short_anchor_repeats_its_first_word_not_the_start():
    model = TinyModel()
    pairs = concept_pairs(model, [Concept("big red dog", anchor="cat")], "subject")[0]
    assert pairs.anchors.equal(encoded(model, "cat")[[1, 1, 1]])


@PADS
@pytest.mark.parametrize("tokens", ["last", "from-last", "subject", "all"])
def test_long_prompts_count_in_the_section_with_the_concept(pad, tokens):
    model = TinyModel(pad)
    text = " ".join(f"w{i}" for i in range(80)) + " red dog on grass"
    pairs = concept_pairs(model, [Concept("red dog", prompts=(text,), anchor="cat")], tokens)[0]
    ids = model.tokenize(Prompt(text, text))
    assert len(ids) == 154
    # Second section: BOS, w75 ... w79, red, dog at 7.
    rows = {"last": [7], "subject": [6, 7], "from-last": range(7, 77), "all": range(1, 77)}[tokens]
    expected = encoded(model, text)[77:][list(rows)]
    assert pairs.targets[-len(expected) :].equal(expected)
    # The anchor ends one place earlier in its prompt: the pairs are shifted by one.
    other = encoded(model, text.replace("red dog", "cat"))[77:]
    beside = [max(row - 1, 1) for row in rows]
    assert pairs.anchors[-len(expected) :].equal(other[beside])
    bos = encoded(model, "")[0]
    assert not (pairs.targets == bos).all(1).any() and not (pairs.anchors == bos).all(1).any()


def test_a_concept_across_sections_counts_from_the_last_ones_start():
    model = TinyModel()
    text = " ".join(f"w{i}" for i in range(74)) + " red dog"  # "dog" opens the second section
    pairs = concept_pairs(model, [Concept("red dog", prompts=(text,), anchor="cat")], "subject")[0]
    assert pairs.targets[-1].equal(encoded(model, text)[77 + 1])
    assert len(pairs.targets) == 2 + 1


def test_aliases_templates_and_own_prompts_add_pairs():
    concept = Concept("dog", aliases=("red hound",), prompts=("a dog here",), anchor="cat")
    model = TinyModel()
    pairs = concept_pairs(model, [concept], "last", lambda _: OBJECT_TEMPLATES)[0]
    assert len(pairs.targets) == 2 + 1 + 2 * 5
    assert pairs.targets[1].equal(encoded(model, "red hound")[2])
    assert pairs.targets[2].equal(encoded(model, "a dog here")[2])
    assert pairs.anchors[2].equal(encoded(model, "a cat here")[2])
    assert pairs.targets[3].equal(encoded(model, "image of dog")[3])
    assert pairs.anchors[3].equal(encoded(model, "image of cat")[3])
    bare = concept_pairs(model, [Concept("dog")], "last", lambda _: OBJECT_TEMPLATES)[0]
    assert bare.anchors.equal(encoded(model, "")[[0] * 6])


def test_a_name_without_tokens_is_refused():
    with pytest.raises(ForgetError, match="are not in the encoded prompt"):
        concept_pairs(TinyModel(), [Concept("dog", prompts=("hotdogs",))], "last")[0]


@PADS
def test_kept_words_by_their_last_token_or_whole(pad):
    model = TinyModel(pad)
    kept = kept_contexts(model, ("blue cat", "", "tree"))
    assert kept.dtype == torch.float64
    assert kept[0].equal(encoded(model, "blue cat")[2])
    assert kept[1].equal(encoded(model, "")[0])
    assert kept[2].equal(encoded(model, "tree")[1])
    every = kept_contexts(model, ("blue cat", "tree"), "all")
    assert every.equal(torch.cat([encoded(model, "blue cat"), encoded(model, "tree")]))
    assert kept_contexts(model, ()).shape == (0, 12)


@PADS
def test_ends_stand_beside_ends(pad):
    model = TinyModel(pad)
    texts = [("a red dog", "a cat"), ("dog", "one big cat")]
    first = end_pairs(model, texts)
    assert first.targets[0].equal(encoded(model, "a red dog")[4])
    assert first.anchors[0].equal(encoded(model, "a cat")[3])
    assert first.targets[1].equal(encoded(model, "dog")[2])
    assert first.anchors[1].equal(encoded(model, "one big cat")[4])
    every = end_pairs(model, texts, "all")
    assert len(every.targets) == 73 + 75
    assert every.targets[:73].equal(encoded(model, "a red dog")[4:])
    assert every.anchors[:73].equal(encoded(model, "a cat")[3:76])
    assert every.anchors[73:].equal(encoded(model, "one big cat")[[*range(4, 77), 76, 76]])


def test_no_more_tokens_are_encoded_than_are_read():
    """Words in few batches, each as long as its longest text up to the first end."""
    asked = []

    class Asked(TinyModel):
        def encode_all(self, texts, length=77):
            asked.append((len(texts), length))
            return super().encode_all(texts, length)

    model = Asked()
    kept_contexts(model, [f"w{i}" for i in range(200)] + ["one two three", "w1"])
    assert asked == [(128, 3), (73, 5)]
    asked.clear()
    concepts = [Concept(f"red thing{i}") for i in range(50)]
    concept_pairs(model, concepts)
    assert asked == [(51, 4)]


def test_what_an_attack_found_is_forgotten_too():
    """A learned embedding equal to the name's own words gives the name's own rows."""
    model = TinyModel()
    with model.borrow_text_encoder() as encoder:
        vectors = encoder.vectors("old dog")
    plain = concept_pairs(model, [Concept("old dog", anchor="cat")])[0]
    both = concept_pairs(model, [Concept("old dog", anchor="cat", learned=(vectors,))])[0]
    assert len(both.targets) == 2 * len(plain.targets)
    for found, known in zip(both, plain):
        torch.testing.assert_close(found[len(known) :], known)
    with pytest.raises(ForgetError, match=r"shape \[2, 3\].*reads \[k, 12\]"):
        concept_pairs(model, [Concept("dog", learned=(torch.zeros(2, 3),))])
