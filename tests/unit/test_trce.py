"""TRCE's first stage with whole matrices against ours."""

import pytest

from fmn.concept import Concept, Prompt
from fmn.keep import keep_for
from fmn.methods import trce
from fmn.spans import END

from .literal import assert_solves, weights
from .test_closed_form import literal_uce
from .tiny import TinyModel, same_tensors, weights_of

CONCEPTS = [
    Concept("dog", aliases=("red hound",), anchor="cat", prompts=("my dog on grass",)),
    Concept("van gogh", "style"),
]
KEEP = ("blue house", "a man on a horse")


def context(model, text):
    return model.encode(Prompt(text, text)).context[0].double()


@pytest.mark.parametrize("pad", [END, 0])
@pytest.mark.parametrize("ends", ["first", "all"])
def test_ends_of_sentences_go_to_the_anchors(pad, ends, tmp_path):
    model = TinyModel(pad)
    settings = trce.Settings(prompts=4, ends=ends, keep_list="none", rank=0, preserve=0.5)
    before = weights_of(model.unet)
    patch = trce.run(model, CONCEPTS, settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    texts = [pair for concept in CONCEPTS for pair in trce.sentences(concept, 4)]
    assert len(texts) == 4 * 3 + 1
    c, anchors = [], []
    for text, other in texts:
        end, other_end = len(text.split()) + 1, len(other.split()) + 1
        for i in range(1 if ends == "first" else 77 - end):
            c.append(context(model, text)[end + i])
            anchors.append(context(model, other)[min(other_end + i, 76)])
    kept = [row for text in ("", *KEEP) for row in context(model, text)]
    expected = {
        name: literal_uce(
            w, c, [w @ anchor for anchor in anchors], kept, 1 / len(texts), 0.5 / 3, 0.1
        )
        for name, w in weights(model).items()
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_sentences_differ_only_in_the_name():
    concept = Concept("zebra", anchor="horse")
    pairs = trce.sentences(concept, 180)
    assert len({text for text, _ in pairs}) == 180
    for text, other in pairs:
        assert text.count("zebra") == 1 and "{" not in text and "  " not in text
        assert other == text.replace("zebra", "horse")
    styles = trce.sentences(Concept("monet", "style", anchor="photo"), 180)
    assert len({text for text, _ in styles}) == 180
    assert all(other == text.replace("monet", "photo") for text, other in styles)


def test_without_an_anchor_the_name_is_left_out():
    pairs = trce.sentences(Concept("dog", prompts=("my Dog on grass",)), 3)
    assert pairs == [
        ("a photo of dog", "a photo of"),
        ("a painting of dog at the beach", "a painting of at the beach"),
        ("dog in a forest", "in a forest"),
        ("my Dog on grass", "my on grass"),
    ]
    own = trce.sentences(CONCEPTS[0], 1)
    assert own[-1] == ("my dog on grass", "my cat on grass")
    assert ("a photo of red hound", "a photo of cat") in own


def test_frames_and_settings_meet_once():
    for frames, others in ((trce.FRAMES, trce.SETTINGS), (trce.STYLE_FRAMES, trce.THINGS)):
        count = len(frames) * len(others)
        assert count >= 180
        assert len({(i % len(frames), i % len(others)) for i in range(count)}) == count


def test_kept_words_count_unless_their_weight_is_zero():
    model = TinyModel()
    none = trce.run(model, CONCEPTS, trce.Settings(prompts=3, preserve=0.0))
    some = trce.run(model, CONCEPTS, trce.Settings(prompts=3))
    assert len(keep_for(CONCEPTS)) > 100
    assert none.info["loss"]["first"] == some.info["loss"]["first"]
    assert none.info["loss"]["last"] < some.info["loss"]["last"]
