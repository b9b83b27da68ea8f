"""Every method in a real ComfyUI: what it gives back after success, an error and Cancel."""

import pytest

from fmn.methods import METHODS

from .parts import concept, gradient_flags, leftovers, same_bits, state

# What makes a run short; methods that solve take a moment as they are.
SHORT = {
    "resteer": {"steps": 2},
    "esd": {"steps": 2, "sampling_steps": 2, "size": 64},
    "ablation": {"steps": 2, "samples": 1, "sample_steps": 2, "size": 64},
    "casteer": {"pairs": 2, "batch": 2, "sampling_steps": 2, "size": 64},
    "hirm": {"steps": 2},
    "trce": {"prompts": 8},
    "reread-many": {"steps": 2, "keep_prompts": 8, "batch": 2},
    "reread": {"prompts": 3, "keep_prompts": 8, "near_words": 0, "sampling_steps": 2, "size": 64},
    "reread-robust": {
        "prompts": 3, "keep_prompts": 8, "sampling_steps": 2, "size": 64, "robust_steps": 2,
        "robust_pictures": 4,
    },
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("short_drawings")
FIRST = [first for first, *_ in METHODS.values()]


class Fault(Exception):
    """Something goes wrong in the middle."""


@pytest.mark.parametrize("ending", ["success", "error", "cancel"])
@pytest.mark.parametrize("preset", [*FIRST, "reread-robust"])
def test_model_and_clip_come_back_bit_identical(pack, comfy_model, preset, ending):
    import comfy.model_management

    cancelled = comfy.model_management.InterruptProcessingException
    raised = {"success": None, "error": Fault, "cancel": cancelled}[ending]

    def on_step(progress):
        if raised and preset != "reread-robust":
            raise raised

    def after_step(progress, run):  # the training of reread-robust comes after its solution
        if raised and progress.index == progress.total:
            raise raised

    methods = pack("fmn.methods")
    options = pack("fmn.training.run").TrainingOptions(after_step=after_step)
    settings = methods.settings_of(preset, SHORT.get(preset, {}))
    patchers = comfy_model.patcher, comfy_model.clip.patcher
    before = [(state(patcher), gradient_flags(patcher)) for patcher in patchers]
    if raised:
        with pytest.raises(raised):
            methods.forget(comfy_model, [concept(pack)], settings, on_step, (), options)
    else:
        patch = methods.forget(comfy_model, [concept(pack)], settings, on_step, (), options)
        assert any(up.abs().sum() > 0 for up, _ in patch.changes.values())
    for patcher, (weights, flags) in zip(patchers, before):
        assert same_bits(weights, state(patcher)) and gradient_flags(patcher) == flags
        assert leftovers(patcher.model) == [] and not patcher.patches


@pytest.mark.parametrize("preset", FIRST)
def test_words_to_keep_count_or_are_refused(pack, comfy_model, preset):
    methods = pack("fmn.methods")
    settings = methods.settings_of(preset, SHORT.get(preset, {}))

    def made(*keep):
        patch = methods.forget(comfy_model, [concept(pack)], settings, keep=keep)
        return {name: up @ down for name, (up, down) in patch.changes.items()}

    if settings.keep_needs:
        with pytest.raises(pack("fmn.errors").ForgetError, match="would ignore the words"):
            made("a yapping puppy")
        return
    without, kept = made(), made("a yapping puppy")
    assert without.keys() != kept.keys() or any((without[k] != kept[k]).any() for k in kept)


def test_a_renamed_setting_keeps_its_input(pack):
    """Workflows for API use name inputs by their id, which stays that of version 0.1."""
    node = next(node for node in pack("nodes.methods").NODES if node.method == "reread")
    ids = [entry.id for entry in node.define_schema().inputs]
    assert ids[1:3] == ["push", "push_style"] and "overshoot" not in ids
    settings = node.execute(push=1.5, kept=7, training_seed=3).result[0]
    assert (settings.overshoot, settings.keep_prompts, settings.seed) == (1.5, 7, 3)
