"""How adversarial training of the tiny model ends early: diverged, refused or cancelled."""

from dataclasses import replace

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.methods.reread import method, training_images
from fmn.training.run import TrainingOptions

from ..tiny import TinyModel, same_tensors, traces, weights_of
from .test_hardening import DOG, NAMES, SETTINGS
from .test_reread_run import STEPS

DRAWN = STEPS + training_images.batch_count(SETTINGS, 1)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(training_images, "DRAWING_STEPS", 3)
    return TinyModel()


def test_a_run_that_diverges_leaves_a_patch(model):
    def poison(progress, run):
        model.poisoned = progress.index == 3

    options = TrainingOptions(after_step=poison)
    with pytest.raises(NonFiniteLoss, match="step 4 of 5") as caught:
        method.run(model, [DOG], replace(SETTINGS, robust_steps=5), options=options)
    patch = caught.value.patch
    assert patch.info["loss"]["steps"] == 2 + 3
    assert all(torch.isfinite(patch.change_of(name)).all() for name in NAMES)


def test_a_run_that_diverges_at_once_leaves_the_closed_form(model):
    def poison(step):
        model.poisoned = step.index == step.total  # all is drawn

    settings = replace(SETTINGS, robust_steps=5)
    with pytest.raises(NonFiniteLoss, match="step 1 of 5") as caught:
        method.run(model, [DOG], settings, poison)
    model.poisoned = False
    plain = method.run(model, [DOG], replace(settings, robust_steps=0))
    assert set(caught.value.patch.changes) == set(plain.changes)
    for name in plain.changes:
        torch.testing.assert_close(caught.value.patch.change_of(name), plain.change_of(name))


@pytest.mark.parametrize(
    "concept",
    [
        Concept("dog", prompts=("very " * 74 + "dog",)),  # two learned words make it 76
        Concept("etching", "style", prompts=("very " * 74 + "etching",)),
    ],
)
def test_prompts_too_long_to_be_attacked_are_refused_before_drawing(model, concept):
    with pytest.raises(ForgetError, match="too long: shorten it to 75 tokens"):
        method.run(model, [concept], SETTINGS)
    assert not model.seen and not traces(model.unet)


@pytest.mark.parametrize("last", [STEPS + 1, DRAWN + 1, DRAWN + SETTINGS.robust_steps])
def test_cancelling(model, last):
    """While pictures are drawn, after the first step of training, and after the last."""
    model.unet.conv_in.weight.requires_grad_(False)
    before = weights_of(model.unet)
    flags = [parameter.requires_grad for parameter in model.unet.parameters()]

    def checkpointed():
        return any("forward" in vars(module) for module in model.unet.modules())

    seen = []

    def cancel(step):
        seen.append(step)
        assert checkpointed() == (len(seen) > DRAWN)
        if len(seen) == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.run(model, [DOG], replace(SETTINGS, checkpointing=True), cancel)
    assert same_tensors(before, weights_of(model.unet))
    assert not traces(model.unet) and not checkpointed()
    assert flags == [parameter.requires_grad for parameter in model.unet.parameters()]
