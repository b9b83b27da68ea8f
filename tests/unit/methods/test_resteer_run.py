"""What surrounds re-steering's loss: settings, data, and the run as a whole."""

import json

import pytest
import torch

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.methods import forget
from fmn.methods.resteer import RELEASED, Settings, prepare, run
from fmn.models.attention_maps import measure_attention
from fmn.training.fit_adapters import in_scope

from ..tiny import TINY, Cancelled, TinyModel, same_tensors, traces, weights_of

MUSK = Concept("elon musk", "identity")
DOG = Concept("dog", aliases=("puppy",))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "all"}, "layers is 'all': choose one of kv, attention, unet"),
        ({"end_tokens": "some"}, "choose one of none, first, all"),
        ({"references": "ones"}, "choose one of zeros, samples"),
        ({"steps": 0}, "steps is 0: use 1 to 100000"),
        ({"rank": 129}, "rank is 129: use 1 to 128"),
        ({"samples": 0}, "samples is 0"),
        ({"lr": 0.0}, "lr is 0.0: use 1e-08 to 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"batch": 65}, "batch is 65: use 1 to 64"),
        ({"size": 100}, "size is 100: use a multiple of 64"),
        ({"size": -64}, "size is -64"),
        ({"size": 8192}, "size is 8192"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ForgetError, match=message):
        Settings(**wrong)


def test_released_settings():
    assert (RELEASED.steps, RELEASED.lr, RELEASED.batch) == (35, 2e-6, 1)
    assert (RELEASED.layers, RELEASED.full_weights, RELEASED.end_tokens) == ("unet", True, "all")
    assert RELEASED.references == "samples"


def test_scopes():
    scopes = {scope: [layer.name for layer in in_scope(TINY, scope)] for scope in ("kv", "unet")}
    attention = [layer.name for layer in in_scope(TINY, "attention")]
    assert [len(scopes["kv"]), len(attention), len(scopes["unet"])] == [14, 28, 119]
    assert all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in scopes["kv"])
    assert all(".attn2." in name for name in attention)


def test_no_concepts():
    with pytest.raises(ForgetError, match="no concept to forget"):
        forget(TinyModel(), [], Settings())


@pytest.mark.parametrize(
    "concept, message",
    [
        # The letters are there, the token is not.
        (Concept("cat", "custom", prompts=("concatenate",)), "tokens of 'cat' are not in .* 'conc"),
        (Concept("cat", prompts=("a dog",)), "'a dog' does not contain the concept 'cat'"),
    ],
)
def test_prepare_cannot_find_the_concept(concept, message):
    with pytest.raises(ForgetError, match=message):
        prepare(TinyModel(), [MUSK, concept], Settings())


def test_prepare():
    model = TinyModel()
    musk = Concept("elon musk", "identity", prompts=("elon musk meets elon musk",))
    data = prepare(model, [musk, DOG], Settings(end_tokens="first", references="zeros"))
    assert [example.concept for example in data.examples] == [0, 0, 1, 1]
    flagged = [example.flags[0].nonzero().flatten().tolist() for example in data.examples]
    assert flagged == [[4, 5, 6], [1, 2, 4, 5, 6], [4, 5], [4, 5]]
    texts = musk.training_prompts() + DOG.training_prompts()
    for example, prompt in zip(data.examples, texts):
        assert torch.equal(example.text.context, model.encode(prompt).context)
    assert [latents.shape for latents in data.latents] == [(1, 4, 8, 8)] * 2
    assert not any(latents.any() for latents in data.latents)


def test_the_subject_is_literal_text():
    """A name's parentheses are not weights, even where the prompt's own are."""
    model, asked = TinyModel(), []
    tokenize = model.tokenize
    model.tokenize = lambda prompt: asked.append(prompt) or tokenize(prompt)
    prepare(model, [Concept("dog", "custom", prompts=("a (big:1.2) dog",))], Settings())
    assert set(asked) == {Prompt("a (big:1.2) dog", "dog", False), Prompt("dog", "dog", True)}


def test_prepare_takes_the_size_in_pixels():
    assert prepare(TinyModel(), [MUSK], Settings(size=128, references="zeros")).latents[
        0
    ].shape == (1, 4, 16, 16)


def test_references():
    model = TinyModel()
    pictures = Concept("cat", images=torch.stack([torch.full((9, 9, 3), v) for v in (0.2, 0.7)]))
    settings = Settings(references="samples", samples=3, seed=5)
    sampled, encoded = prepare(model, [MUSK, pictures], settings).latents
    assert torch.equal(sampled, model.sample(None, range(5, 8), 64, None, None))
    assert torch.equal(encoded, model.encode_images(pictures.images, 64))


SETTINGS = Settings(steps=12, lr=0.02)


def merged(model, patch):
    other = TinyModel(model.pad)
    for name in patch.changes:
        with torch.no_grad():
            other.unet.get_submodule(name).weight += patch.change_of(name)
    return other


@pytest.mark.parametrize("full, scope", [(False, "kv"), (True, "kv"), (False, "unet")])
def test_a_run_forgets_and_leaves_the_model_as_it_was(full, scope):
    model, steps = TinyModel(), []
    before, hash_before = weights_of(model.unet), model.fingerprint()
    settings = Settings(steps=25, lr=0.02, full_weights=full, layers=scope, rank=8)
    patch = run(model, [MUSK], settings, steps.append)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())

    losses = steps[-1].losses
    assert [step.index for step in steps] == list(range(1, 26)) and steps[0].total == 25
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert steps[-1].attention_now.share < 0.6 * steps[-1].attention_before.share
    assert patch.family is TINY and len(patch.changes) == len(in_scope(TINY, scope))
    assert patch.info["base.fingerprint"] == hash_before
    assert patch.info["loss"] == {"first": losses[0], "last": losses[-1], "steps": 25}
    assert patch.info["settings"]["layers"] == scope
    assert patch.concepts == ["elon musk"]
    json.dumps(patch.info)

    # The patch alone does what training did: on the weights, without adapters.
    data = prepare(model, [MUSK], settings)
    [untouched], [forgetful] = (
        measure_attention(model, data),
        measure_attention(merged(model, patch), data),
    )
    assert forgetful.share < 0.6 * untouched.share
    assert untouched.map.shape == (32, 32)
    torch.testing.assert_close(float(untouched.map.mean()), untouched.share, rtol=0.02, atol=0)


def test_the_patch_is_the_trained_state(monkeypatch):
    """Low-rank factors go into the patch as they are, so it gives what the last look saw."""
    monkeypatch.setattr("fmn.models.attention_maps.STEPS", (0.5,))
    model, steps = TinyModel(), []
    data = prepare(model, [MUSK], SETTINGS)
    [before] = measure_attention(model, data)
    patch = run(model, [MUSK], SETTINGS, steps.append)
    [after] = measure_attention(merged(model, patch), data)
    assert steps[0].attention_before.share == pytest.approx(before.share, rel=1e-4)
    assert steps[-1].attention_now.share == pytest.approx(after.share, rel=1e-4) != before.share


def test_equal_seeds_give_equal_patches():
    first, again, other = (
        run(TinyModel(), [MUSK], Settings(steps=1, seed=seed)).changes for seed in (1, 1, 2)
    )
    for name, (up, down) in first.items():
        assert torch.equal(up, again[name][0]) and torch.equal(down, again[name][1])
        assert not torch.equal(down, other[name][1])  # where it started
    assert any(not torch.equal(up, other[name][0]) for name, (up, _) in first.items())


def test_steps_are_a_concepts():
    steps = []
    patch = run(TinyModel(), [MUSK, DOG], Settings(steps=3), steps.append)
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6] and steps[0].total == 6
    assert patch.concepts == ["elon musk", "dog"]


def test_training_inside_inference_mode():
    # ComfyUI runs nodes in it.
    expected = run(TinyModel(), [MUSK], SETTINGS)
    model = TinyModel()
    with torch.inference_mode():
        patch = forget(model, [MUSK], SETTINGS)
    for name in expected.changes:
        torch.testing.assert_close(patch.change_of(name), expected.change_of(name))


def test_weights_may_be_bfloat16():
    model, steps = TinyModel(), []
    model.unet.to(torch.bfloat16)
    before = weights_of(model.unet)
    patch = run(model, [MUSK], Settings(steps=20, lr=0.02), steps.append)
    assert same_tensors(weights_of(model.unet), before)
    assert {up.dtype for up, _ in patch.changes.values()} == {torch.float32}
    assert steps[-1].attention_now.share < 0.6 * steps[-1].attention_before.share


@pytest.mark.parametrize("checkpointing", [False, True])
def test_cancelling_leaves_the_model_as_it_was(checkpointing):
    model = TinyModel()
    before, steps = weights_of(model.unet), []

    def on_step(step):
        steps.append(step)
        assert len(traces(model.unet)) > 14  # so that the check below can fail
        if step.index == 3:
            raise Cancelled

    settings = Settings(checkpointing=checkpointing, layers="attention")
    with pytest.raises(Cancelled):
        run(model, [MUSK], settings, on_step)
    assert len(steps) == 3
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_an_error_in_the_model_leaves_it_as_it_was():
    model = TinyModel()
    before = weights_of(model.unet)

    def fails(*args, **arguments):
        raise RuntimeError("out of memory")

    model.unet.mid_block.forward = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, [MUSK], SETTINGS)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == ["mid_block"] and model.unet.mid_block.forward is fails


@pytest.mark.parametrize("full", [False, True])
def test_a_blow_up_carries_the_last_good_patch(full):
    """The fourth step's attention is NaN: the patch is the third's, made by two updates."""
    model, losses = TinyModel(), []
    before = weights_of(model.unet)

    def on_step(step):
        losses.append(step.losses[-1])
        model.poisoned = step.index == 3

    with pytest.raises(NonFiniteLoss, match="not finite at step 4 of 6") as caught:
        run(model, [MUSK], Settings(steps=6, full_weights=full), on_step)
    assert caught.value.losses == losses and len(losses) == 3
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []

    patch = caught.value.patch
    assert patch.info["loss"] == {"first": losses[0], "last": losses[-1], "steps": 3}
    expected = run(TinyModel(), [MUSK], Settings(steps=2, full_weights=full)).changes
    assert patch.changes.keys() == expected.keys()
    for name, factors in expected.items():
        assert all(torch.equal(mine, other) for mine, other in zip(patch.changes[name], factors))


@pytest.mark.parametrize("done", [0, 1])
def test_an_early_blow_up_carries_nothing(done):
    # The last good state after one step is the one before it: no change at all.
    model = TinyModel()
    model.poisoned = done == 0

    def on_step(step):
        model.poisoned = True

    with pytest.raises(NonFiniteLoss, match=f"not finite at step {done + 1} of 9") as caught:
        run(model, [MUSK], Settings(steps=9), on_step)
    assert caught.value.patch is None and len(caught.value.losses) == done
    assert traces(model.unet) == []


def test_learned_tokens_take_the_place_of_the_name():
    """The released pipeline's first part: textual inversion, whose tokens are then the target."""
    from fmn.models.token_positions import word_positions

    model = TinyModel()
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    dog, told = Concept("dog", images=pictures), []
    how = Settings(steps=2, inverted=3, inversion_steps=4, end_tokens="first")
    [example] = prepare(model, [dog], how, told.append).examples
    assert len(told) == 4
    # "a photo of" and three tokens, then EOT.
    assert example.flags[0].nonzero().flatten().tolist() == [4, 5, 6, 7]
    plain = model.encode(Prompt("a photo of dog", "dog")).context[0]
    words = word_positions(model.tokenize(Prompt("a photo of", "")))
    assert example.text.context[0, words].equal(plain[words])
    assert not example.text.context[0, 4].equal(plain[4])
    before = weights_of(model.unet)
    patch = run(model, [dog], how)
    assert patch.info["loss"]["steps"] == 2 and same_tensors(before, weights_of(model.unet))


def test_learned_tokens_need_pictures():
    with pytest.raises(ForgetError, match="no reference pictures to learn tokens from"):
        prepare(TinyModel(), [DOG], Settings(inverted=2))
