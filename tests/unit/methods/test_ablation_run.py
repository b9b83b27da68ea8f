"""Runs of Concept Ablation: what the patch does, and that the model comes back."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.methods import ablation, forget
from fmn.methods.ablation import Settings, run
from fmn.models.families import layers
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import save_patch

from ..tiny import TINY, Cancelled, TinyModel, same_tensors, traces, weights_of

DOG = Concept("dog", anchor="cat")
MUSK = Concept("elon musk", "identity", anchor="a man")
QUICK = Settings(steps=3, samples=1, batch=2)


def distance(unet, frozen, target, anchor):
    """How far the prediction for one prompt is from the frozen model's for another."""
    model, generator = TinyModel(), torch.Generator().manual_seed(3)
    x, t = torch.randn(4, 4, 8, 8, generator=generator), torch.tensor([100, 300, 600, 900])
    contexts = [model.encode(Prompt(p, p)).context.expand(4, -1, -1) for p in (target, anchor)]
    with torch.no_grad():
        found, wanted = unet(x, t, contexts[0]).sample, frozen(x, t, contexts[1]).sample
    return float((found - wanted).square().mean())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_turns_the_concept_into_its_anchor(tmp_path, checkpointing):
    """The saved file, applied by hand as any LoRA, does it; the loaded model is as it was."""
    model, steps = TinyModel(), []
    before = weights_of(model.unet)
    settings = Settings(steps=30, lr=0.02, samples=2, checkpointing=checkpointing)
    patch = run(model, [DOG], settings, steps.append)
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())
    assert len(steps) == 30 and steps[-1].attention_before.share != steps[-1].attention_now.share
    losses = steps[-1].losses
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert (patch.info["method"], patch.info["settings"]["teacher"]) == ("ablation", "frozen")
    assert patch.info["concepts"][0]["anchor"] == "cat"

    changed, tensors = copy.deepcopy(model.unet), load_file(save_patch(patch, tmp_path / "a"))
    kv = [layer for layer in layers(TINY) if layer.is_key_or_value]
    assert len(tensors) == 2 * len(kv)
    for layer in kv:
        parts = "lora_up.weight", "lora_down.weight"
        up, down = (tensors[f"{file_name(TINY, layer)}.{part}"].float() for part in parts)
        change = up @ down
        torch.testing.assert_close(change, patch.change_of(layer.name), rtol=5e-3, atol=1e-4)
        with torch.no_grad():
            changed.get_submodule(layer.name).weight += change
    frozen = model.unet
    far = distance(frozen, frozen, "a photo of dog", "a photo of cat")
    assert distance(changed, frozen, "a photo of dog", "a photo of cat") < 0.25 * far
    assert distance(changed, frozen, "a photo of cat", "a photo of cat") < 0.1 * far


def test_kept_words_change_less():
    moved, settings = [], Settings(steps=40, lr=0.02, samples=1, preserve=20.0)
    for keep in ((), ("a photo of wolf",)):
        model = TinyModel()
        patch = run(model, [DOG], settings, keep=keep)
        changed = copy.deepcopy(model.unet)
        with torch.no_grad():
            for name in patch.changes:
                changed.get_submodule(name).weight += patch.change_of(name)
        moved.append(distance(changed, model.unet, "a photo of wolf", "a photo of wolf"))
    assert moved[1] < 0.5 * moved[0]


def test_steps_are_a_concepts_and_seeds_repeat():
    steps = []
    first = run(TinyModel(), [DOG, MUSK], QUICK, steps.append)
    again, other = (run(TinyModel(), [DOG, MUSK], replace(QUICK, seed=s)) for s in (0, 1))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5, 6] and steps[0].total == 6
    assert first.concepts == ["dog", "elon musk"]
    for name, (up, down) in first.changes.items():
        assert torch.equal(up, again.changes[name][0]) and torch.equal(down, again.changes[name][1])
        assert not torch.equal(up, other.changes[name][0])


def test_the_seed_decides_what_is_drawn():
    """The first loss, before any change, depends on nothing else."""
    losses = []
    for seed in (0, 0, 1):
        run(TinyModel(), [DOG], Settings(steps=1, references="zeros", seed=seed), losses.append)
    first, again, other = (step.losses[0] for step in losses)
    assert first == again != other


def test_inference_mode_and_bfloat16():
    expected, model = run(TinyModel(), [DOG], QUICK), TinyModel()
    with torch.inference_mode():  # ComfyUI runs nodes in it
        patch = forget(model, [DOG], QUICK)
    for name in expected.changes:
        torch.testing.assert_close(patch.change_of(name), expected.change_of(name))
    model.unet.to(torch.bfloat16)
    before = weights_of(model.unet)
    patch = run(model, [DOG], replace(QUICK, prior=0.5), keep=("a wolf",))
    assert same_tensors(weights_of(model.unet), before)
    assert any(up.any() for up, _ in patch.changes.values())


def test_protect_fixes_lora_down(monkeypatch):
    fixed = {layer.name: torch.eye(12)[3:5] for layer in layers(TINY) if layer.is_key_or_value}
    monkeypatch.setattr(ablation, "protected_downs", lambda *args: fixed)
    patch = run(TinyModel(), [DOG], replace(QUICK, protect=True))
    assert patch.changes.keys() == fixed.keys()
    for name, (up, down) in patch.changes.items():
        assert torch.equal(down, fixed[name]) and up.any()
    monkeypatch.undo()
    with pytest.raises(ForgetError, match="protect works for low-rank keys and values alone"):
        run(TinyModel(), [DOG], replace(QUICK, protect=True, layers="unet"))


def test_cancelling_and_blowing_up_leave_the_model_as_it_was():
    model = TinyModel()
    before = weights_of(model.unet)

    def cancel(step):
        assert len(traces(model.unet)) >= 14  # so that the check below can fail
        raise Cancelled

    with pytest.raises(Cancelled):
        run(model, [DOG], QUICK, cancel)
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []

    def poison(step):
        model.poisoned = step.index == 2

    with pytest.raises(NonFiniteLoss, match="not finite at step 3 of 3") as caught:
        run(model, [DOG], QUICK, poison)
    assert caught.value.patch.concepts == ["dog"] and len(caught.value.losses) == 2
    assert same_tensors(weights_of(model.unet), before) and traces(model.unet) == []


def test_the_concept_must_be_in_its_prompt():
    # The letters are there, the token is not.
    with pytest.raises(ForgetError, match="tokens of 'cat' are not in"):
        run(TinyModel(), [Concept("cat", "custom", prompts=("concatenate",))], QUICK)
