"""Re-read in the text encoder: its loss written out, what it trains, and both hosts' encoders."""

import pytest
import torch

from fmn.closed_form.input_edit import weight_gram
from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.prompt_templates import styled_sentences
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import forget, reread_text, settings_of
from fmn.methods.reread_text import Lessons, Settings, read_metric
from fmn.models.adapters import attached
from fmn.models.families import DEMO, layers, text_layers
from fmn.models.image_sampler import open_sampler
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.task import Task
from fmn.training.fit_adapters import make_adapters
from tests.unit.tiny import same_tensors, weights_of

PAIRS = [("a photo of a dog", "a photo of a"), ("a robot, twemoji", "twemoji"), ("cat", "")]
KEPT, OWN = ["", "a horse", "an apple, 3d render"], ["a car"]


@pytest.fixture(scope="module")
def model():
    return DiffusersModel.load("demo")


@pytest.fixture(scope="module")
def metric(model):
    with model.borrow_denoiser() as denoiser:
        return read_metric(denoiser, DEMO)


def test_the_metric_is_what_keys_and_values_make_of_a_context(model, metric):
    context = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    with model.borrow_denoiser() as denoiser:
        weights = [denoiser.module(x.name).weight for x in layers(DEMO) if x.is_key_or_value]
        made = sum((context @ weight.mT).square().sum(1) for weight in weights)
        trace = weight_gram(denoiser, DEMO).trace()
    torch.testing.assert_close((context @ metric).square().sum(1) * float(trace), made)


def test_the_loss_is_the_documented_one(model, metric):
    settings = Settings(batch=4, preserve=2.0)
    with model.borrow_text_encoder(words=False) as encoder, attached({}, encoder.module) as switch:
        lessons = Lessons(encoder, switch, PAIRS, KEPT, OWN, metric, settings)
        length = lessons.concept.shape[2]
        # BOS, six words in the longest, EOT, and padding behind it
        assert length == 8 + reread_text.MARGIN

        def read(texts):
            contexts = model.encode_all(texts)[:, :length] @ metric
            return contexts.flatten(1)

        before, targets = (read([pair[side] for pair in PAIRS]) for side in (0, 1))
        apart = (before - targets).square().sum(1)
        # Untouched, all of each difference is left and nothing that is kept has moved.
        assert float(lessons(0)) == pytest.approx(1.0, rel=1e-4)
        torch.testing.assert_close(lessons.stored[1], apart, rtol=1e-4, atol=0)
        assert float(lessons.scale) == pytest.approx(float(apart.mean()), rel=1e-4)
        name = "text_encoder.text_model.encoder.layers.2.mlp.fc2"
        shift = torch.randn(128, generator=torch.Generator().manual_seed(2))
        hook = encoder.module(name).register_forward_hook(lambda m, args, out: out + shift)
        generator = torch.Generator()
        generator.set_state(lessons.generator.get_state())
        loss = float(lessons(1))
        chosen = torch.randint(3, (4,), generator=generator)
        rows = torch.randint(3, (4,), generator=generator)
        rows[:2] = 3 + torch.randint(1, (2,), generator=generator)
        texts = [PAIRS[i][0] for i in chosen], [[*KEPT, *OWN][i] for i in rows]
        with torch.no_grad():
            gone, stay = (
                encoder.encode_ids(encoder.ids_of(each)[..., :length]).context @ metric
                for each in texts
            )
        hook.remove()
    left = (gone.flatten(1) - targets[chosen]).square().sum(1) / apart[chosen]
    moved = (stay.flatten(1) - read(texts[1])).square().sum(1).mean() / apart.mean()
    assert loss == pytest.approx(float(left.mean() + 2 * moved), rel=1e-4)


def test_a_long_list_is_encoded_step_by_step_alike(model, metric):
    """Fewer draws than pairs: nothing is stored, and the losses of changed weights are the same."""
    names = ["text_encoder.text_model.encoder.layers.2.mlp.fc2"]
    with model.borrow_text_encoder(words=False) as encoder:
        adapters = make_adapters(encoder, names, Settings(rank=2))
        with attached(adapters, encoder.module) as switch:
            few, many = (
                Lessons(encoder, switch, PAIRS, KEPT, OWN, metric, Settings(batch=2, steps=steps))
                for steps in (1, 2)
            )
            with torch.no_grad():
                for parameter in adapters[names[0]].parameters():
                    parameter.normal_(generator=torch.Generator().manual_seed(3))
                assert few.stored is None and many.stored is not None
                for step in range(3):
                    wanted = float(many(step))
                    assert float(few(step)) == pytest.approx(wanted, rel=1e-4) and wanted > 1.01


def test_cut_ids_give_the_same_beginning(model):
    with model.borrow_text_encoder(words=False) as encoder, torch.no_grad():
        ids = encoder.ids_of(["a photo of a dog", "a cat"])
        assert ids.shape == (2, 1, 77)
        whole, part = encoder.encode_ids(ids).context, encoder.encode_ids(ids[..., :12]).context
    torch.testing.assert_close(part, whole[:, :12], rtol=0, atol=1e-5)
    expected = model.encode(Prompt("a cat", "a cat")).context[0]
    torch.testing.assert_close(whole[1], expected, rtol=0, atol=1e-5)


def test_two_concepts_go_and_a_kept_one_stays(model, tmp_path):
    concepts = [Concept("dog"), Concept("santa claus", "identity")]
    encoder, unet = model.pipeline.text_encoder, model.unet
    before = weights_of(encoder), weights_of(unet)
    told = []
    settings = settings_of("reread-many", {"steps": 80, "keep_prompts": 60, "batch": 16})
    patch = forget(model, concepts, settings, told.append, keep=["a cat"])
    assert same_tensors(before[0], weights_of(encoder)) and same_tensors(
        before[1], weights_of(unet)
    )
    assert not any(module._forward_hooks for module in encoder.modules())
    assert set(patch.changes) == {layer.name for layer in text_layers(DEMO)}
    assert len(told) == 80 and told[-1].losses[-1] < 0.3 * told[0].losses[0]
    patch = load_patch(save_patch(patch, tmp_path / "many.safetensors"))
    texts = ["a photo of a dog", "a photo of a", "a cat"]
    dog, without, cat = model.encode_all(texts)
    with open_sampler(model) as sampler, sampler.applying([(patch, 1.0)]):
        worn = sampler.model.encode_all(texts)
    assert (worn[0] - without).norm() < 0.5 * (dog - without).norm()
    assert (worn[2] - cat).norm() < 0.3 * (dog - without).norm()


def test_sentences_with_styles():
    styles = ["oil painting", "pixel art", "etching"]
    found = styled_sentences(Concept("dog"), styles, 4)
    assert found == [
        ("dog, oil painting", "oil painting"),
        ("etching of a dog", "etching of"),
        ("dog in the style of pixel art", "in the style of pixel art"),
        ("a picture of a dog, oil painting", "a picture of, oil painting"),
    ]
    anchored = styled_sentences(Concept("dog", aliases=("hound",), anchor="cat"), styles, 1)
    assert anchored == [
        ("dog, oil painting", "cat, oil painting"), ("hound, etching", "cat, etching")
    ]  # fmt: skip
    assert styled_sentences(Concept("etching", "style"), styles, 4) == []
    assert styled_sentences(Concept("dog"), (), 4) == []


def test_a_concept_goes_from_sentences_with_given_words_too(model):
    settings = Settings(prompts=2)
    pairs, _, given = reread_text._texts(Task(model, [Concept("dog")], settings, keep=["twemoji"]))
    assert ("dog, twemoji", "twemoji") in pairs and ("twemoji of a dog", "twemoji of") in pairs
    assert "twemoji" in given
    pairs, _, given = reread_text._texts(Task(model, [Concept("dog")], settings))
    assert len(pairs) == 4 and given == []


def test_a_sentence_that_is_too_long_is_refused(model):
    concept = Concept("dog", prompts=("a dog " * 60,))
    with pytest.raises(ForgetError, match="75 tokens"):
        forget(model, [concept], settings_of("reread-many", {"steps": 1}))
