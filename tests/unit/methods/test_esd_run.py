"""What surrounds ESD's loss: the run as a whole, and the model that comes back."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.methods import forget
from fmn.methods.esd import Settings, run
from fmn.patches.patch import save_patch

from ..tiny import Cancelled, TinyModel, same_tensors, traces, weights_of

DOG = Concept("dog", aliases=("puppy",))
QUICK = Settings(steps=3, sampling_steps=3)


def texts_of(model, *prompts):
    return [model.encode(Prompt(prompt, prompt)).context for prompt in prompts]


def loss_of(model, unet, seed=3):
    """How far a U-Net is from ESD's target for the dog, on noise."""
    concept, empty = texts_of(model, "a photo of dog", "")
    x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        e_p, e_0 = (model.unet(x_t, 999, c.expand(4, -1, -1)).sample for c in (concept, empty))
        e_n = unet(x_t, 999, concept.expand(4, -1, -1)).sample
    return float((e_n - (e_0 - (e_p - e_0))).square().mean())


def merged(model, change_of, names):
    """A float32 copy of the U-Net with changes added to its weights."""
    unet = copy.deepcopy(model.unet).float()
    with torch.no_grad():
        for name in names:
            unet.get_submodule(name).weight += change_of(name)
    return unet


@pytest.mark.parametrize("layers, lr, checkpointing", [("x", 5e-3, False), ("all", 1e-3, True)])
def test_a_run_forgets_and_leaves_the_model_as_it_was(layers, lr, checkpointing, tmp_path):
    model, steps = TinyModel(), []
    before, hash_before = weights_of(model.unet), model.fingerprint()
    settings = Settings(
        steps=20, lr=lr, sampling_steps=1, checkpointing=checkpointing, layers=layers
    )
    patch = run(model, [Concept("dog")], settings, steps.append)
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())
    losses = steps[-1].losses
    assert [step.index for step in steps] == list(range(1, 21)) and steps[0].total == 20
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]  # the untouched model's
    before, after = steps[0].attention_before.share, steps[-1].attention_now.share
    assert 0 < before < 1 and after != before
    assert patch.info["base.fingerprint"] == hash_before
    assert patch.info["method"] == "esd" and patch.info["settings"]["layers"] == layers
    json.dumps(patch.info)

    # The file is a plain LoRA: W + up @ down does what training did.
    saved = load_file(save_patch(patch, tmp_path / "dog.safetensors"))

    def by_hand(name):
        key = "lora_unet_" + name.replace(".", "_")
        up, down = saved[f"{key}.lora_up.weight"], saved[f"{key}.lora_down.weight"]
        change = up.flatten(1).float() @ down.flatten(1).float()
        return change.view_as(patch.change_of(name))

    for name in patch.changes:
        torch.testing.assert_close(by_hand(name), patch.change_of(name), rtol=0.01, atol=1e-4)
    after = loss_of(model, merged(model, by_hand, patch.changes))
    assert after < 0.5 * loss_of(model, model.unet)


def test_equal_seeds_give_equal_patches():
    first, again, other = (
        run(TinyModel(), [DOG], replace(QUICK, seed=seed)).changes for seed in (1, 1, 2)
    )
    for name, (up, down) in first.items():
        assert torch.equal(up, again[name][0]) and torch.equal(down, again[name][1])
    assert any(not torch.equal(up, other[name][0]) for name, (up, _) in first.items())


def test_training_inside_inference_mode():
    # ComfyUI runs nodes in it.
    expected, model = run(TinyModel(), [DOG], QUICK), TinyModel()
    with torch.inference_mode():
        patch = forget(model, [DOG], QUICK)
    for name in expected.changes:
        torch.testing.assert_close(patch.change_of(name), expected.change_of(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model = TinyModel()
    model.unet.to(dtype)
    before, losses = weights_of(model.unet), []
    settings = Settings(steps=16, lr=1e-2, sampling_steps=2)
    patch = run(
        model, [Concept("dog")], settings, lambda step: losses.append(float(step.losses[-1]))
    )
    assert same_tensors(weights_of(model.unet), before)
    assert {up.dtype for up, _ in patch.changes.values()} == {torch.float32}
    assert all(torch.isfinite(up).all() for up, _ in patch.changes.values())
    model.unet.float()
    after = loss_of(model, merged(model, patch.change_of, patch.changes))
    assert after < 0.6 * loss_of(model, model.unet) and len(losses) == 16


def test_cancelling_between_steps():
    model = TinyModel()
    before, steps = weights_of(model.unet), []

    def on_step(step):
        steps.append(step.index)
        assert len(traces(model.unet)) == 28  # so that the check below can fail
        if step.index == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(model, [DOG], QUICK, on_step)
    assert steps == [1, 2]
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


@pytest.mark.parametrize("sample_from", ["frozen", "edited"])
def test_a_host_may_stop_a_drawing(sample_from, monkeypatch):
    """What a forward raises gets through from the middle of a drawing, and leaves nothing."""
    model, sizes = TinyModel(), []
    before, forward = weights_of(model.unet), model.unet.forward

    def interrupted(x_t, *args, **arguments):
        sizes.append(len(x_t))
        if sizes[-3:] == [2, 2, 2]:  # the third pair in a row: a drawing
            raise Cancelled
        return forward(x_t, *args, **arguments)

    monkeypatch.setattr(model.unet, "forward", interrupted)
    with pytest.raises(Cancelled):
        run(model, [DOG], Settings(steps=50, sampling_steps=8, sample_from=sample_from))
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == [""]  # the test's own
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_blow_up_carries_the_last_good_patch():
    model, losses = TinyModel(), []
    before = weights_of(model.unet)

    def on_step(step):
        losses.append(step.losses[-1])
        model.poisoned = step.index == 3

    with pytest.raises(NonFiniteLoss, match="not finite at step 4 of 6") as caught:
        run(model, [Concept("dog")], replace(QUICK, steps=6), on_step)
    assert caught.value.losses == losses and len(losses) == 3
    assert caught.value.patch.info["loss"]["steps"] == 3
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []


def test_a_concept_that_is_not_in_its_prompt():
    with pytest.raises(ForgetError, match="does not contain the concept 'cat'"):
        run(TinyModel(), [Concept("cat", prompts=("a dog",))], QUICK)
