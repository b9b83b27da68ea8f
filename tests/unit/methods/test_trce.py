"""TRCE's first stage with whole matrices against ours."""

import pytest

from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.keep_list import keep_for
from fmn.concepts.prompt_templates import sentences
from fmn.methods import trce
from fmn.models.token_positions import EOS_ID

from ..literal import assert_solves, literal_uce, weights
from ..tiny import TinyModel, same_tensors, weights_of

CONCEPTS = [
    Concept("dog", aliases=("red hound",), anchor="cat", prompts=("my dog on grass",)),
    Concept("van gogh", "style"),
]
KEEP = ("blue house", "a man on a horse")


def context(model, text):
    return model.encode(Prompt(text, text)).context[0].double()


@pytest.mark.parametrize("pad", [EOS_ID, 0])
@pytest.mark.parametrize("ends", ["first", "all"])
def test_ends_of_sentences_go_to_the_anchors(pad, ends, tmp_path):
    model = TinyModel(pad)
    settings = trce.Settings(prompts=4, ends=ends, keep_list="none", rank=0, preserve=0.5)
    before = weights_of(model.unet)
    patch = trce.run(model, CONCEPTS, settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    texts = [pair for concept in CONCEPTS for pair in sentences(concept, 4)]
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


def test_kept_words_count_unless_their_weight_is_zero():
    model = TinyModel()
    none = trce.run(model, CONCEPTS, trce.Settings(prompts=3, preserve=0.0))
    some = trce.run(model, CONCEPTS, trce.Settings(prompts=3))
    assert len(keep_for(CONCEPTS)) > 100
    assert none.info["loss"]["first"] == pytest.approx(some.info["loss"]["first"], rel=1e-12)
    assert none.info["loss"]["last"] < some.info["loss"]["last"]
