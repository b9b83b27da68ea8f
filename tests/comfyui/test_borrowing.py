"""What borrowing a MODEL leaves behind: nothing, however training ends."""

import pytest
import torch

from .parts import concept, gradient_flags, leftovers, settings, state


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers, full", [("kv", False), ("attention", True), ("unet", True)])
def test_borrowed_model_comes_back_unchanged(pack, comfy_model, layers, full, checkpointing):
    patcher = comfy_model.patcher
    before, flags = state(patcher), gradient_flags(patcher)
    pack("fmn.methods.resteer").run(
        comfy_model,
        [concept(pack)],
        settings(pack, layers=layers, full_weights=full, checkpointing=checkpointing),
    )
    after = state(patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(patcher.model) == []
    assert gradient_flags(patcher) == flags


@pytest.mark.parametrize("when", [1, 2])
def test_borrowed_model_comes_back_after_an_exception(pack, comfy_model, when):
    patcher = comfy_model.patcher
    before = state(patcher)

    def fail(step):
        if step.index == when:
            raise RuntimeError("a fault in the loop")

    with pytest.raises(RuntimeError, match="a fault in the loop"):
        pack("fmn.methods.resteer").run(
            comfy_model, [concept(pack)], settings(pack, checkpointing=True), fail
        )
    after = state(patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(patcher.model) == []


def test_another_packs_forward_survives(pack, comfy_model):
    """A forward that somebody else put on a module is back in place afterwards."""
    attention = comfy_model.patcher.model.diffusion_model.get_submodule(
        "middle_block.1.transformer_blocks.0.attn2"
    )
    theirs = attention.forward
    attention.forward = theirs
    try:
        pack("fmn.methods.resteer").run(comfy_model, [concept(pack)], settings(pack))
        assert attention.__dict__["forward"] is theirs
    finally:
        del attention.forward


def test_cancel_ends_training_within_the_step(pack, comfy_model):
    """ComfyUI's interrupt stops the very next forward: no other step is reported."""
    import comfy.model_management as management

    steps = []

    def cancel_at_the_third(step):
        steps.append(step.index)
        if step.index == 3:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        pack("fmn.methods.resteer").run(
            comfy_model, [concept(pack)], settings(pack, steps=10), cancel_at_the_third
        )
    assert steps == [1, 2, 3]
    assert leftovers(comfy_model.patcher.model) == []
