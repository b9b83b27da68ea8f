"""Hardening that goes on from a file: the adversaries learn on where they were."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from fmn.errors import ForgetError
from fmn.methods.reread import adversarial_training, training_images
from fmn.models.families import CLIP_G, CLIP_L
from fmn.training.resume import load_state, save_state
from fmn.training.run import TrainingOptions
from tests.integration.test_resume import resumed_from, run, saved_at, tensors_of

from ..tiny import TINY, TinyModel, same_tensors, weights_of
from .test_hardening import SETTINGS

LONG = replace(SETTINGS, robust_steps=7)  # of each of two concepts
AT = 9


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two adversaries of each concept, each of which lives for two of its steps."""
    monkeypatch.setattr(training_images, "DRAWING_STEPS", 3)
    monkeypatch.setattr(adversarial_training, "ADVERSARIES", 2)
    monkeypatch.setattr(adversarial_training, "LIFETIME", 2)


def model_of(encoders=1):
    model = TinyModel()
    if encoders == 2:
        model.family = replace(TINY, texts=(CLIP_L, CLIP_G))
    return model


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A function that gives the state after step 9 of 14."""
    file = tmp_path_factory.mktemp("state") / "a.fmn-train"

    def made():
        if not file.exists():
            run(TinyModel(), LONG, saved_at(AT, file))
        return load_state(file)

    return made


@cache
def whole_run(encoders=1):
    return run(model_of(encoders), LONG)


@pytest.mark.parametrize("encoders, at", [(1, 1), (1, 8), (2, AT)])
def test_it_equals_an_uninterrupted_run(encoders, at, tmp_path):
    """With two encoders the adversaries are contexts, with one they are words."""
    file, trained = tmp_path / "a.fmn-train", []
    whole = whole_run(encoders)
    watched = run(model_of(encoders), LONG, saved_at(at, file))
    model = model_of(encoders)
    before = weights_of(model.unet)
    after_step = lambda progress, run: trained.append(progress.index)  # noqa: E731
    resumed = run(model, LONG, resumed_from(file, after_step=after_step))
    assert same_tensors(tensors_of(resumed), tensors_of(whole))
    assert same_tensors(tensors_of(watched), tensors_of(whole))  # saving changes nothing
    assert trained == list(range(at + 1, 15))
    assert resumed.info["loss"] == whole.info["loss"] and whole.info["loss"]["steps"] == 2 + 14
    assert same_tensors(weights_of(model.unet), before)


def test_what_the_state_holds(state):
    """Step 9 begins the fifth turn of the first concept: its first adversary is a new one."""
    beside = {name: t for name, t in state().tensors.items() if name.startswith("beside.")}
    names = {name.split(".", 1)[1] for name in beside}
    each = {"", ".exp_avg", ".exp_avg_sq", ".step"}
    living = [f"{concept}.{slot}" for concept in "01" for slot in "01"]
    assert names == {"scale"} | {f"{one}{part}" for one in living for part in each}
    ages = [float(beside[f"beside.{one}.step"]) for one in living]
    assert ages == [1, 2, 2, 2] and float(beside["beside.scale"]) == 1


@pytest.mark.parametrize("part", ["", ".exp_avg", ".exp_avg_sq"])
def test_each_part_of_an_adversary_matters(state, part):
    """So that the tests above could fail."""
    changed = state()
    changed.tensors[f"beside.0.0{part}"] += 1.0
    resumed = run(TinyModel(), LONG, TrainingOptions(changed))
    assert not same_tensors(tensors_of(resumed), tensors_of(whole_run()))


@pytest.mark.parametrize("name", ["beside.scale", "beside.1.0"])
def test_a_state_without_an_adversary_is_refused(state, name, tmp_path):
    cut = state()
    for key in [key for key in cut.tensors if key.startswith(name)]:
        del cut.tensors[key]
    save_state(cut, tmp_path / "cut.fmn-train")
    with pytest.raises(ForgetError, match=f"does not fit what is trained: '{name}' is in one"):
        run(TinyModel(), LONG, resumed_from(tmp_path / "cut.fmn-train"))


def test_one_of_another_shape_is_refused(state, tmp_path):
    odd = state()
    for part in ("", ".exp_avg", ".exp_avg_sq"):
        odd.tensors[f"beside.0.1{part}"] = torch.ones(3)
    save_state(odd, tmp_path / "odd.fmn-train")
    with pytest.raises(ForgetError, match="'beside.0.1' of shape .3., and"):
        run(TinyModel(), LONG, resumed_from(tmp_path / "odd.fmn-train"))


def test_the_closed_form_alone_does_not_go_on(state):
    with pytest.raises(ForgetError, match="reread solves and does not train, so it cannot resume"):
        run(TinyModel(), replace(LONG, robust_steps=0), TrainingOptions(state()))


def test_more_steps_may_be_added_and_the_best_is_kept(state):
    longer, seen = replace(LONG, robust_steps=8), []
    patch = run(TinyModel(), longer, TrainingOptions(state(), keep_best=True), seen.append)
    best = seen[-1].best_step
    means = [sum(seen[-1].losses[i - 10 : i]) / 10 for i in range(10, 17)]
    assert best == 10 + means.index(min(means))
    assert patch.info["loss"]["steps"] == 2 + best
