"""A run that goes on from a file equals one that was never interrupted, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import forget, settings_of
from fmn.patches.patch import load_patch
from fmn.progress import ignore
from fmn.training.loop import AdamWConfig, Trainer
from fmn.training.resume import load_state, save_state, state_path
from fmn.training.run import SMOOTHED, TrainingOptions
from tests.unit.tiny import TinyModel, same_tensors, traces, weights_of
from tests.unit.training.test_train import Overflow, loss_of, start

CONCEPTS = [Concept("dog", aliases=("puppy",), anchor="cat"), Concept("owl", anchor="cat")]
CASES = {
    "resteer": ("resteer", {"batch": 2}),
    "resteer, whole weights": ("resteer", {"full_weights": True, "layers": "attention"}),
    "esd": ("esd", {"sampling_steps": 3}),
    "esd, edited, bins": (
        "esd",
        {
            "sampling_steps": 3,
            "sample_from": "edited",
            "timesteps": "bin",
            "layers": "x-strict",
            "protect": True,
        },
    ),
    "ablation": ("ablation", {"samples": 2, "sample_steps": 2, "batch": 2}),
}


def tensors_of(patch):
    return {
        f"{name}.{i}": factor
        for name, both in patch.changes.items()
        for i, factor in enumerate(both)
    }


def saved_at(step, path, **options):
    """Options that save the training state after one step, and train on."""

    def save(progress, run):
        if progress.index == step:
            save_state(run.state(), path)

    return TrainingOptions(after_step=save, **options)


def resumed_from(file, **options):
    return TrainingOptions(resume=load_state(file), **options)


def run(model, settings, options=None, on_step=ignore):
    keep = () if settings.keep_needs else ("a house",)
    return forget(model, CONCEPTS, settings, on_step, keep, options)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path):
    preset, changes = CASES[case]
    settings = settings_of(preset, changes | {"steps": 4, "seed": 3})
    file = tmp_path / "dog.fmn-train"
    whole = run(TinyModel(), settings)  # 8 steps: 4 for each concept
    watched = run(TinyModel(), settings, saved_at(3, file))
    model, steps = TinyModel(), []
    before = weights_of(model.unet)
    resumed = run(model, settings, resumed_from(file), steps.append)
    assert same_tensors(tensors_of(resumed), tensors_of(whole))
    assert same_tensors(tensors_of(watched), tensors_of(whole))  # saving changes nothing
    assert [step.index for step in steps] == [4, 5, 6, 7, 8]
    assert resumed.info["loss"] == whole.info["loss"] and whole.info["loss"]["steps"] == 8
    assert same_tensors(weights_of(model.unet), before)


TEXT = {
    "hirm": ({"steps": 3}, {"steps": 1}),  # of each concept
    # Its rate depends on the number of steps.
    "reread-many": ({"steps": 4, "keep_prompts": 8, "batch": 2}, {}),
}


@pytest.mark.parametrize("preset", TEXT)
def test_a_text_encoder_s_training_goes_on_too(preset, tmp_path):
    settings, file = settings_of(preset, TEXT[preset][0]), tmp_path / "a.fmn-train"
    model = DiffusersModel.load("demo")
    whole = forget(model, CONCEPTS, settings)
    forget(model, CONCEPTS, replace(settings, **TEXT[preset][1]), options=saved_at(2, file))
    resumed = forget(model, CONCEPTS, settings, options=resumed_from(file))
    assert same_tensors(tensors_of(resumed), tensors_of(whole))


def test_a_state_with_a_setting_s_former_name_goes_on(tmp_path):
    settings, file = settings_of("reread-many", TEXT["reread-many"][0]), tmp_path / "a.fmn-train"
    model = DiffusersModel.load("demo")
    whole = forget(model, CONCEPTS, settings, options=saved_at(2, file))
    state = load_state(file)
    state.record["settings"]["kept"] = state.record["settings"].pop("keep_prompts")
    resumed = forget(model, CONCEPTS, settings, options=TrainingOptions(state))
    assert same_tensors(tensors_of(resumed), tensors_of(whole))
    state.record["settings"]["kept"] += 1
    with pytest.raises(ForgetError, match="made with keep_prompts 9.*this is 8"):
        forget(model, CONCEPTS, settings, options=TrainingOptions(state))


def test_a_shorter_run_goes_on_with_more_steps(tmp_path):
    settings, file = settings_of("resteer", {"steps": 3}), tmp_path / "a.fmn-train"
    run(TinyModel(), replace(settings, steps=1), saved_at(2, file))
    resumed = run(TinyModel(), settings, resumed_from(file))
    assert same_tensors(tensors_of(resumed), tensors_of(run(TinyModel(), settings)))


def test_a_state_can_be_used_twice(tmp_path):
    """Going on must not write into it."""
    settings, file = settings_of("resteer", {"steps": 2}), tmp_path / "a.fmn-train"
    run(TinyModel(), settings, saved_at(2, file))
    state = load_state(file)
    first, second = (run(TinyModel(), settings, TrainingOptions(state)) for _ in range(2))
    assert same_tensors(tensors_of(first), tensors_of(second))


def test_adamws_memory_matters(tmp_path):
    """So that the tests above could fail."""
    settings, file = settings_of("resteer", {"steps": 3}), tmp_path / "a.fmn-train"
    run(TinyModel(), settings, saved_at(3, file))
    state = load_state(file)
    for key in list(state.tensors):
        if key.endswith(("exp_avg", "exp_avg_sq", "step")):
            del state.tensors[key]
    resumed = run(TinyModel(), settings, TrainingOptions(state))
    assert not same_tensors(tensors_of(resumed), tensors_of(run(TinyModel(), settings)))


def test_a_loop_resumes_after_float16_overflowed():
    """Attempts that overflowed count too, and the smaller loss scale stays."""

    def trainer_of(draws, steps, resume_state=None):
        parameters = start()

        def loss_at(index):
            value = Overflow.apply(loss_of(parameters, index)).sum()
            return value * (1 + 0.01 * next(draws))

        return Trainer(parameters, AdamWConfig(0.1), steps, 512.0, resume_state), loss_at

    whole, loss_at = trainer_of(iter(range(100)), 5)
    list(whole.run(loss_at))
    assert whole.attempts == 8 and whole.loss_scale == 64.0

    part, loss_at = trainer_of(iter(range(100)), 2)
    list(part.run(loss_at))
    state = part.state()
    assert state.attempts == 5
    again, loss_at = trainer_of(iter(range(state.attempts, 100)), 5, state)
    with torch.no_grad():
        for ours, theirs in zip(again.parameters, part.parameters):
            ours.copy_(theirs)
    list(again.run(loss_at))
    assert again.losses == whole.losses
    assert all(map(torch.equal, again.parameters, whole.parameters))


def test_parameters_without_gradient_have_no_moments():
    used, unused = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    trainer = Trainer([used, unused], AdamWConfig(0.1), 2)
    list(trainer.run(lambda index: used.square()))
    moments = trainer.state().moments
    assert moments[0]["step"] == 2 and moments[1] is None


def test_a_state_of_version_0_1_ends_in_its_patch_bit_for_bit():
    """Saved by version 0.1 after 4 of 8 steps on the demo model, beside the patch of all 8."""
    model, files = DiffusersModel.load("demo"), Path(__file__).parents[1] / "data" / "resume"
    settings = settings_of("resteer", {"steps": 8, "rank": 1, "references": "zeros"})
    options = resumed_from(files / "resteer-0.1.fmn-train")
    patch = forget(model, [Concept("dog")], settings, options=options)
    expected = load_file(files / "resteer-0.1.safetensors")
    factors = {key: expected[key] for key in expected if not key.endswith(".alpha")}
    assert same_tensors(patch.lora(), factors)
    assert patch.info["loss"] == load_patch(files / "resteer-0.1.safetensors").info["loss"]


LONG = {"steps": 15, "lr": 0.05, "seed": 1}  # a rate at which the loss jumps


def best_by_hand(settings):
    """Means of the last losses, and the patch of the step at which that was lowest."""
    seen = []

    def after_step(progress, run):
        patch = run.patch() if progress.index >= SMOOTHED else None
        seen.append((list(progress.losses), patch))

    run(TinyModel(), settings, TrainingOptions(after_step=after_step))
    means = [
        (sum(losses[-SMOOTHED:]) / SMOOTHED, i)
        for i, (losses, patch) in enumerate(seen)
        if patch is not None
    ]
    return means, seen[min(means)[1]][1], seen[-1][1]


def test_the_best_step_is_kept(tmp_path):
    settings, file = settings_of("resteer", LONG), tmp_path / "a.fmn-train"
    means, best, last = best_by_hand(settings)
    assert min(means)[1] < len(means) + SMOOTHED - 2  # else keeping the last would do
    kept = run(TinyModel(), settings, saved_at(17, file, keep_best=True))
    assert same_tensors(tensors_of(kept), tensors_of(best))
    assert not same_tensors(tensors_of(kept), tensors_of(last))
    assert kept.info["loss"]["steps"] == min(means)[1] + 1
    resumed = run(TinyModel(), settings, resumed_from(file, keep_best=True))
    assert same_tensors(tensors_of(resumed), tensors_of(best))


def test_too_few_steps_to_choose_from_keep_the_last():
    settings = settings_of("resteer", {"steps": 3, "lr": 0.05})
    kept = run(TinyModel(), settings, TrainingOptions(keep_best=True))
    assert same_tensors(tensors_of(kept), tensors_of(run(TinyModel(), settings)))


OTHER = {
    "method": (dict(preset="esd"), "made with the method 'resteer', and this is 'esd'"),
    "no training": (dict(preset="uce"), "uce solves and does not train, so it cannot resume"),
    "concepts": (dict(concepts=CONCEPTS[:1]), "made with concepts 'dog, owl', and this is 'dog'"),
    "setting": (dict(lr=0.5), "made with lr 0.002, and this is 0.5: only steps may differ"),
    "seed": (dict(seed=9), "made with seed 0, and this is 9"),
    "base": (dict(model_seed=1), "made with a base model of fingerprint"),
    "done": (dict(steps=2), "has 4 finished steps and 4 are asked for: set more steps"),
}


@pytest.mark.parametrize("case", OTHER)
def test_nothing_else_goes_on(case, tmp_path):
    changes, message = dict(OTHER[case][0]), OTHER[case][1]
    file = tmp_path / "a.fmn-train"
    run(TinyModel(), settings_of("resteer", {"steps": 2}), saved_at(4, file))
    model = TinyModel(seed=changes.pop("model_seed", 0))
    before = weights_of(model.unet)
    concepts, preset = changes.pop("concepts", CONCEPTS), changes.pop("preset", "resteer")
    settings = settings_of(preset, changes if preset != "resteer" else {"steps": 4} | changes)
    with pytest.raises(ForgetError, match=message) as caught:
        forget(model, concepts, settings, options=resumed_from(file))
    assert "a.fmn-train" in str(caught.value)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []


def test_the_file_stands_beside_the_patch(tmp_path):
    assert state_path(tmp_path / "a_00001.safetensors").name == "a_00001.fmn-train"
    assert state_path("a.fmn-train").name == "a.fmn-train"
    assert state_path("a").name == "a.fmn-train"
