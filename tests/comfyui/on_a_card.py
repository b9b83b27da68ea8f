"""Where U-Net and text encoders do not both fit on a card, or none may stay; by a mock of one.

    python -m pytest -p second_device.plugin comfyui/on_a_card.py

ComfyUI then leaves a model on the card in part or not at all, and of what is away it adds LoRAs
while a layer runs: the weight itself lacks them.
"""

from contextlib import contextmanager
from functools import partial

import pytest
from second_device import plugin

from .parts import concept, same_bits, state
from .test_every_method import SHORT
from .test_paged import assert_same

pytestmark = pytest.mark.usefixtures("short_drawings")
TIGHT = 1 << 20  # bytes free, always
STATES = {"tight": (TIGHT, "NORMAL_VRAM"), "novram": (plugin.MEMORY, "NO_VRAM")}


@pytest.fixture
def little(monkeypatch):
    """Function to make memory short from now on, in one of the ways of ``STATES``."""
    import comfy.model_management as management

    def become(how):
        free, kind = STATES[how]
        monkeypatch.setattr(plugin, "MEMORY", free)
        monkeypatch.setattr(management, "vram_state", management.VRAMState[kind])
        management.unload_all_models()

    yield become
    management.unload_all_models()


@pytest.fixture
def clip_on_card(pack, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "text_encoder_device", lambda: plugin.CARD)


@pytest.fixture
def made(pack):
    """Function to a preset's patch of a short run."""
    methods = pack("fmn.methods")

    def forget(host, preset, name="dog", after_step=None):
        options = pack("fmn.training.run").TrainingOptions(after_step=after_step)
        settings = methods.settings_of(preset, SHORT.get(preset, {}))
        return methods.forget(host, [concept(pack, name)], settings, options=options)

    return forget


@pytest.fixture
def worn(pack, clip_on_card, comfy_model, made):
    """The demo with patches on the U-Net and on the text encoder; and one of the former."""
    host = comfy_model
    for preset in ("uce", "reread"):
        patch = made(comfy_model, preset, "tree")
        host = type(host)(host.patched(patch, 1.0), host.clip)
    clip = host.patched_clip(made(comfy_model, "quickfix", "tree"), 1.0)
    return type(host)(host.patcher, clip), patch


def test_weights_are_read_with_what_is_worn(pack, worn, comfy_model, made, little, monkeypatch):
    """After texts were encoded, which takes the U-Net off the card."""
    host, on_unet = worn
    merging, hash_model = pack("fmn.jobs.joint_merge"), pack("fmn.jobs.recipe").hash_model
    short = partial(
        merging.Settings,
        prompts=3,
        keep_prompts=8,
        images_per_concept=1,
        sampling_steps=2,
        near_words=0,
    )
    monkeypatch.setattr(merging, "Settings", short)
    patchers = comfy_model.patcher, comfy_model.clip.patcher

    def solved():
        found = [made(host, preset) for preset in ("reread", "quickfix")]
        return *found, merging.joint_merge(host, [(on_unet, 1.0)]).patch

    expected = solved()
    little("tight")
    before = [state(patcher) for patcher in patchers]
    for how in STATES:
        little(how)
        for patch, other in zip(solved(), expected):
            assert patch.changes.keys() == other.changes.keys()
            for name in patch.changes:
                one, two = patch.change_of(name), other.change_of(name)
                assert (one - two).norm() < 1e-2 * two.norm(), (how, name)
        assert hash_model(host) != hash_model(comfy_model)
    little("tight")
    assert all(same_bits(weights, state(each)) for weights, each in zip(before, patchers))


@pytest.mark.parametrize("preset", ["hirm", "reread-many"])
def test_text_encoders_come_back_after_a_preview(
    pack, clip_on_card, comfy_model, made, little, preset
):
    expected, pictures = made(comfy_model, preset), []
    previews = pack("fmn.training.preview").Previews(comfy_model, ["a dog"], steps=1)

    def draw(progress, run):
        pictures.extend(previews.during(run))

    little("tight")
    assert_same(made(comfy_model, preset, after_step=draw), expected)
    assert len(pictures) == 2


def test_contexts_that_attack_are_where_texts_are(pack, comfy_model, made, monkeypatch):
    """As on XL, whose text encoders ComfyUI may leave on the CPU."""
    hardening, adversaries = (
        pack("fmn.methods.reread.adversarial_training"),
        pack("fmn.methods.reread.adversaries"),
    )

    @contextmanager
    def contexts(model, denoiser):
        assert denoiser.device == plugin.CARD
        yield lambda *given: adversaries.Context(*given, denoiser.device)

    monkeypatch.setattr(hardening, "adversaries", contexts)
    assert comfy_model.encode(concept(pack).training_prompts()[0]).context.device.type == "cpu"
    assert len(made(comfy_model, "reread-robust").info["loss"]) > 2
