"""Gated patches in ComfyUI, with objects in hand; ``test_guidance.py`` has one in a server."""

import pytest
import torch

from .parts import concept, leftovers, settings, state
from .test_guidance import CONCEPT, PROMPT, conditioning, refused, sample


@pytest.fixture
def nodes(pack):
    return pack("nodes.guidance")


@pytest.fixture
def texts(demo):
    with torch.inference_mode():
        return {text: conditioning(demo[1], text) for text in (PROMPT, CONCEPT, "")}


@pytest.fixture
def patch(pack, comfy_model):
    run = pack("fmn.methods.resteer").run
    return run(comfy_model, [concept(pack)], settings(pack, steps=10, layers="unet"))


def gated(nodes, model, clip, patch, strength=1.0, low=-1.0, high=-0.99):
    with torch.inference_mode():
        return nodes.ApplyGatedPatch.execute(model, clip, patch, strength, low, high).args[0]


def test_an_open_gate_is_the_merged_patch_and_a_closed_one_is_none(
    nodes, demo, comfy_model, patch, texts
):
    model, clip, _ = demo
    before, plain = state(model), sample(model, texts[PROMPT], texts[""])
    merged = sample(comfy_model.patched(patch, 1.0), texts[PROMPT], texts[""])
    assert (merged - plain).abs().mean() > 0.02

    half = gated(nodes, model, clip, patch, 0.5)
    chained = gated(nodes, half, clip, patch, 0.5)
    onto = gated(nodes, comfy_model.patched(patch, 0.5), clip, patch, 0.5)
    for variant in (gated(nodes, model, clip, patch), chained, onto):
        # Factors and merged weights round differently, in float32.
        assert (sample(variant, texts[PROMPT], texts[""]) - merged).abs().max() < 5e-3
    closed = gated(nodes, model, clip, patch, low=0.9999, high=1.0)
    far = sample(closed, texts[CONCEPT], texts[""])
    assert torch.equal(far, sample(model, texts[CONCEPT], texts[""]))

    assert torch.equal(sample(model, texts[PROMPT], texts[""]), plain)
    after = state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(model.model) == []


def test_rows_of_a_batch_have_their_own_gates(pack, nodes, demo, patch, texts):
    """With default thresholds the dog's row is gated, the empty one and a castle's are not."""
    gate = pack("fmn.guidance.prompt_gate").patch_gate(
        pack("fmn.hosts.comfyui.model").ComfyModel(*demo), patch
    )
    with torch.inference_mode():
        castle = conditioning(demo[1], "a castle, pixel art")[0][0]
        amount = gate(torch.cat([texts[PROMPT][0][0], texts[""][0][0], castle]))
    assert amount.tolist() == [1.0, 0.0, 0.0]
    # So the dog is drawn as if its own prediction alone wore the patch.
    model = demo[0]
    seen = []

    def note(args):
        seen.append((args["cond_denoised"], args["uncond_denoised"]))
        return args["denoised"]

    def predictions(patcher):
        clone = patcher.clone()
        clone.set_model_sampler_post_cfg_function(note)
        seen.clear()
        sample(clone, texts[PROMPT], texts[""])
        return seen[0]

    with_patch = predictions(gated(nodes, model, demo[1], patch, 1.0, 0.85, 0.95))
    without = predictions(model)
    assert (with_patch[0] - without[0]).abs().max() > 0.01
    assert (with_patch[1] - without[1]).abs().max() < 1e-4


def test_hooks_come_off_when_sampling_is_cancelled(nodes, demo, patch, texts):
    import comfy.model_management as management

    model = gated(nodes, demo[0], demo[1], patch)
    worn = []

    def interrupt(*_):
        worn.append(bool(leftovers(demo[0].model)))
        management.interrupt_current_processing()

    layer = demo[0].model.diffusion_model.middle_block[1].proj_out
    handle = layer.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(management.InterruptProcessingException):
            sample(model, texts[PROMPT], texts[""])
    finally:
        handle.remove()
    assert worn == [True]
    assert leftovers(demo[0].model) == []


def test_a_patch_of_the_text_encoder_has_no_gate(pack, nodes, demo, patch):
    families = pack("fmn.models.families")
    layer = next(
        layer for layer in families.layers_by_name(families.DEMO).values() if layer.is_text
    )
    factors = torch.ones(layer.shape[0], 1), torch.ones(1, layer.shape[1])
    words = pack("fmn.patches.patch").ForgetPatch(families.DEMO, {layer.name: factors}, patch.info)
    with refused(pack, "This patch changes the text encoder"):
        gated(nodes, demo[0], demo[1], words)
