"""Previews while training: drawn with the adapters as they are, and without a trace."""

import numpy as np
import pytest
from safetensors.torch import load_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.images import to_image
from fmn.methods import forget, settings_of
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling
from fmn.patches.patch import load_patch
from fmn.training.preview import Previews
from fmn.training.resume import load_state, state_path
from fmn.training.run import SaveEvery, TrainingOptions
from tests.unit.tiny import Cancelled, TinyModel, same_tensors, traces, weights_of

DOG, PROMPTS = [Concept("dog")], ("a dog", "a house")
SETTINGS = {"steps": 4, "lr": 0.05}


def pixels(picture):
    return np.asarray(picture).astype(int)


def drawn_with(model, patch):
    """The same pictures with a patch applied."""
    with open_sampler(model, Sampling(3, 7.0), 1) as sampler, sampler.applying([(patch, 1.0)]):
        return [to_image(sampler.draw([prompt], [5])[0]) for prompt in PROMPTS]


def tensors_of(patch):
    return {f"{name}{i}": t for name, both in patch.changes.items() for i, t in enumerate(both)}


@pytest.mark.parametrize("preset", ["resteer", "esd", "ablation"])
def test_previews_show_the_adapters_of_their_step(preset):
    model, seen = TinyModel(), []
    previews = Previews(model, PROMPTS, 3, 5)

    def after_step(progress, run):
        seen.append((previews.during(run), run.patch()))

    options = TrainingOptions(after_step=after_step)
    patch = forget(model, DOG, settings_of(preset, SETTINGS), options=options)
    plain = [np.array(pixels(each)) for each in drawn_with(TinyModel(), make_nothing(patch))]
    for rows, then in seen:
        assert [prompt for prompt, *_ in rows] == list(PROMPTS)
        for (_, before, now), untouched, worn in zip(rows, plain, drawn_with(TinyModel(), then)):
            assert np.array_equal(pixels(before), untouched)
            assert np.abs(pixels(now) - pixels(worn)).max() <= 1
    last, after = seen[-1][0], previews.after(patch)
    assert np.abs(pixels(last[0][2]) - pixels(after[0][2])).max() <= 1
    assert np.array_equal(pixels(last[0][1]), pixels(after[0][1]))
    assert any(not np.array_equal(pixels(a), pixels(b)) for _, a, b in last)  # else all is vain
    # Drawing in between changes nothing.
    alone = forget(TinyModel(), DOG, settings_of(preset, SETTINGS))
    assert same_tensors(tensors_of(patch), tensors_of(alone))


def make_nothing(patch):
    changes = {name: (up * 0, down) for name, (up, down) in patch.changes.items()}
    return type(patch)(patch.family, changes, patch.info)


def test_a_text_encoder_in_training_is_drawn_with():
    model, rows = DiffusersModel.load("demo"), []
    previews = Previews(model, ["a dog"], 2, 5)

    def after_step(progress, run):
        if progress.index == 3:
            rows.extend(previews.during(run))
            rows.append(run.patch())

    options = TrainingOptions(after_step=after_step)
    forget(model, DOG, settings_of("hirm", {"steps": 4}), options=options)
    [(_, before, now), patch] = rows
    [(_, untouched, worn)] = Previews(DiffusersModel.load("demo"), ["a dog"], 2, 5).after(patch)
    assert np.array_equal(pixels(before), pixels(untouched))
    assert np.abs(pixels(now) - pixels(worn)).max() <= 1
    assert not np.array_equal(pixels(now), pixels(before))


def test_cancel_inside_a_preview():
    def cancel(count):
        raise Cancelled

    model = TinyModel()
    before = weights_of(model.unet)
    previews = Previews(model, PROMPTS, 3, 5, cancel)
    with pytest.raises(Cancelled):
        options = TrainingOptions(after_step=lambda progress, run: previews.during(run))
        forget(model, DOG, settings_of("resteer", SETTINGS), options=options)
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_other_models_have_no_previews():
    model = TinyModel()
    model.family = type("Other", (), {"known": False, "title": "Flux"})()
    with pytest.raises(ForgetError, match="Flux is none of them: set preview_every to 0"):
        Previews(model, PROMPTS)


def test_saved_every_some_steps_and_at_the_end(tmp_path):
    save, kept = SaveEvery(3, lambda step: tmp_path / f"dog_{step}.safetensors"), []

    def after_step(progress, run):
        save(progress, run)
        kept.append(sorted(path.name for path in tmp_path.iterdir()))

    settings = settings_of("resteer", SETTINGS | {"steps": 7})
    patch = forget(TinyModel(), DOG, settings, options=TrainingOptions(after_step=after_step))
    assert kept[1] == []
    assert kept[2] == ["dog_3.fmn-train", "dog_3.safetensors"]
    assert kept[5] == ["dog_3.safetensors", "dog_6.fmn-train", "dog_6.safetensors"]
    assert [name for name in kept[6] if "train" in name] == ["dog_7.fmn-train"]
    assert len(load_state(state_path(tmp_path / "dog_7.safetensors")).losses) == 7
    assert same_tensors(load_file(tmp_path / "dog_7.safetensors"), patch.lora())
    with pytest.raises(ForgetError, match="choose the patch beside it"):
        load_patch(tmp_path / "dog_7.fmn-train")


def test_nothing_is_saved_by_methods_that_solve(tmp_path):
    save = SaveEvery(1, lambda step: tmp_path / "dog.safetensors")
    options = TrainingOptions(after_step=save)
    forget(TinyModel(), DOG, settings_of("uce", {}), options=options)
    assert list(tmp_path.iterdir()) == []
