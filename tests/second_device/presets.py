"""Every method through diffusers, on the CPU and on the second device: the same patch."""

from dataclasses import fields, replace

import pytest
import torch
from second_device.plugin import CARD

from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import METHODS, forget, resteer, settings_of
from fmn.methods.reread import training_images

# The first preset of each method, and those that run other code than it does.
CHOSEN = [presets[0] for presets in METHODS.values()] + [
    "reread-auto", "reread-robust", "resteer-released", "esd-u", "ablation-released", "oce-style",
    "oce-reflection", "oce-projection", "hirm-r",
]  # fmt: skip
SHORT = {
    "steps": 2, "sampling_steps": 2, "sample_steps": 2, "robust_steps": 2, "robust_pictures": 4,
    "size": 64, "samples": 1, "pairs": 2, "batch": 2, "prompts": 3, "keep_prompts": 8, "latents": 2,
    "near_words": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return [DiffusersModel.load("demo", device) for device in (torch.device("cpu"), CARD)]


def shortened(settings):
    names = {field.name for field in fields(settings)} & SHORT.keys()
    longer = {name for name in names if getattr(settings, name) > SHORT[name]}
    return replace(settings, **{name: SHORT[name] for name in longer})


@pytest.fixture(autouse=True)
def short_drawings(monkeypatch):
    monkeypatch.setattr(resteer, "SAMPLE_STEPS", 2)
    monkeypatch.setattr(training_images, "DRAWING_STEPS", 2)


@pytest.mark.parametrize("preset", CHOSEN)
def test_a_patch_is_the_same(models, preset):
    style = preset.endswith("-style")
    concept = Concept("watercolor", kind="style") if style else Concept("dog")
    settings = shortened(settings_of(preset, {}))
    one, other = (forget(model, [concept], settings) for model in models)
    assert one.changes.keys() == other.changes.keys()
    for name in one.changes:
        assert all(factor.device.type == "cpu" for factor in other.changes[name])
        first, second = one.change_of(name), other.change_of(name)
        assert (first - second).norm() <= 3e-3 * first.norm() + 1e-8, name
