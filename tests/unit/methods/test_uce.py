"""UCE against equation 7, written out layer by layer."""

import pytest
import torch

from fmn.closed_form.text_embeddings import kept_contexts
from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.keep_list import keep_for
from fmn.errors import ForgetError
from fmn.methods import forget, uce
from fmn.patches.task import Task

from ..literal import assert_solves, literal_uce, weights
from ..tiny import TinyModel, same_tensors, weights_of

CONCEPTS = [
    Concept("dog", aliases=("hound",), anchor="cat"),
    Concept("van gogh", "style", anchor="a painter"),
    Concept("red car"),
]
KEEP = ("blue house", "tree", "a man on a horse")


def last(model, text):
    """The context of a text's last word; of an empty one, BOS."""
    return model.encode(Prompt(text, text)).context[0].double()[len(text.split())]


def literal(model, kept, settings, concepts=CONCEPTS):
    pairs = [
        (last(model, name), last(model, concept.anchor))
        for concept in concepts
        for name in concept.subjects
    ]
    return {
        name: literal_uce(
            weight, [c for c, _ in pairs], [weight @ anchor for _, anchor in pairs], kept,
            settings.erase, settings.preserve, settings.damping,
        )
        for name, weight in weights(model).items()
    }  # fmt: skip


def test_several_concepts_with_anchors_and_a_keep_list(tmp_path):
    model = TinyModel()
    settings = uce.Settings(erase=2.0, preserve=0.3, damping=0.1, keep_list="none")
    before = weights_of(model.unet)
    patch = uce.run(model, CONCEPTS, settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    expected = literal(model, [last(model, text) for text in KEEP], settings)
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")
    assert patch.ranks == [4] and patch.info["method"] == "uce"
    assert patch.info["truncation_error"] == 0


def test_the_shipped_list_is_kept_beside_the_given_words(tmp_path):
    model, settings = TinyModel(), uce.Settings()
    patch = uce.run(model, CONCEPTS, settings, keep=KEEP)
    words = keep_for(CONCEPTS, KEEP, "auto")
    assert len(words) > 100
    expected = literal(model, [last(model, text) for text in words], settings)
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_a_weight_of_zero_keeps_nothing(tmp_path):
    model, settings = TinyModel(), uce.Settings(preserve=0.0)
    patch = uce.run(model, CONCEPTS, settings, keep=KEEP)
    assert_solves(patch, model, literal(model, [], settings), tmp_path / "patch.safetensors")


def test_2023_edits_the_end_and_keeps_whole_prompts(tmp_path):
    """from-last: position i of the prompt goes with i of the anchor's; all of "" is kept."""
    model, concept = TinyModel(), Concept("dog", anchor="cat")
    settings = uce.PRESETS["uce-2023"]
    patch = uce.run(model, [concept], settings, keep=KEEP)
    kept = kept_contexts(model, ("", *keep_for([concept], KEEP)), "all")
    c, anchor = (
        model.encode(Prompt(text, text)).context[0].double()[1:] for text in ("dog", "cat")
    )
    expected = {
        name: literal_uce(weight, c, anchor @ weight.T, kept, 1.0, 0.1, 0.5)
        for name, weight in weights(model).items()
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_templates_are_of_the_kind():
    model = TinyModel()
    settings = uce.Settings(expand=True, keep_list="none")
    pairs, _ = uce.uce_rows(Task(model, CONCEPTS, settings))
    assert len(pairs.targets) == (2 + 2 * 5) + (1 + 5) + (1 + 5)
    assert pairs.targets[13].equal(last(model, "painting by van gogh"))
    assert pairs.anchors[13].equal(last(model, "painting by a painter"))
    assert pairs.targets[2].equal(last(model, "image of dog"))


def test_attributes_shift_the_concept(tmp_path):
    model, concept = TinyModel(), Concept("doctor", "identity")
    settings = uce.Settings(attributes="young woman 0.3, man -0.4", keep_list="none")
    patch = uce.run(model, [concept], settings, keep=KEEP)
    c, woman, man = (last(model, text) for text in ("doctor", "young woman", "man"))
    kept = [last(model, text) for text in KEEP]
    expected = {
        name: literal_uce(
            w, [c], [w @ c + 0.3 * (w @ woman) - 0.4 * (w @ man)], kept, 1.0, 1.0, 0.5
        )
        for name, w in weights(model).items()
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")
    assert patch.ranks == [1]


@pytest.mark.parametrize("text", ["woman", "woman, man 0.3", "woman 0.3,", "0.3", "woman nan"])
def test_attributes_that_say_nothing_are_refused(text):
    with pytest.raises(ForgetError, match="has to be words and a number"):
        uce.Settings(attributes=text)


def test_attributes_and_an_anchor_are_refused():
    with pytest.raises(ForgetError, match="'dog' has an anchor"):
        uce.run(TinyModel(), CONCEPTS, uce.Settings(attributes="cat 0.5"))


def test_a_kept_concept_is_refused():
    with pytest.raises(ForgetError, match="both to be kept and to be forgotten"):
        uce.run(TinyModel(), CONCEPTS, keep=("hound",))


def test_inference_mode_is_left():
    model = TinyModel()
    with torch.inference_mode():
        patch = forget(model, CONCEPTS, uce.Settings())
    assert not any(factor.is_inference() for pair in patch.changes.values() for factor in pair)


def test_a_hundred_concepts_in_one_patch():
    """More pairs than dimensions: the rank is the width."""
    concepts = [Concept(f"name{i}", "identity") for i in range(100)]
    patch = uce.run(TinyModel(), concepts)
    # A layer of 8 outputs has no more than 8.
    assert patch.ranks == [8, 12] and patch.info["truncation_error"] == 0
