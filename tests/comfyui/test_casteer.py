"""CASteer on the demo model: through ComfyUI and diffusers alike, and what it leaves behind."""

import pytest
import torch

from .parts import concept, leftovers, state


def few(pack, **more):
    settings = {"pairs": 2, "batch": 2, "sampling_steps": 2, "guidance": 3.5, "size": 64}
    return pack("fmn.methods.casteer").Settings(**settings | more)


def given(model, pack, names, words):
    """What some layers give for 'a photo of WORDS' at noise of seed 0: name -> [P, C]."""
    outputs = {}
    text = model.encode(pack("fmn.concepts.concept").Prompt(f"a photo of {words}", words))
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        handles = [
            denoiser.module(name).register_forward_hook(
                lambda module, args, output, name=name: outputs.update({name: output[0].double()})
            )
            for name in names
        ]
        denoiser.predict_noise(x_t, torch.tensor([900]), text)
        for handle in handles:
            handle.remove()
    return outputs


def test_both_hosts_make_the_same_patch(pack, comfy_model):
    run = pack("fmn.methods.casteer").run
    pipeline_model = pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")
    before = state(comfy_model.patcher)
    theirs = run(pipeline_model, [concept(pack)], few(pack))
    ours = run(comfy_model, [concept(pack)], few(pack))
    assert ours.ranks == [1] and ours.changes.keys() == theirs.changes.keys()
    for name in ours.changes:
        difference = ours.change_of(name) - theirs.change_of(name)
        assert difference.norm() < 1e-2 * ours.change_of(name).norm()
    after = state(comfy_model.patcher)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(comfy_model.patcher.model) == []


def test_the_direction_is_gone_but_for_the_bias(pack, comfy_model):
    """Every pixel then gives S S^T b along S, whatever the prompt; prints how much that is."""
    patch = pack("fmn.methods.casteer").run(comfy_model, [concept(pack)], few(pack))
    patched = type(comfy_model)(comfy_model.patched(patch, 1.0), comfy_model.clip)
    names = list(patch.changes)
    with comfy_model.borrow_denoiser() as denoiser:
        biases = {name: denoiser.module(name).bias.detach().double() for name in names}
    plain = given(comfy_model, pack, names, "dog")
    shares = []
    for words in ("dog", "apple"):
        for name, rows in given(patched, pack, names, words).items():
            direction = torch.nn.functional.normalize(patch.changes[name][0][:, 0].double(), dim=0)
            left, constant = rows @ direction, biases[name] @ direction
            before = (plain[name] @ direction - constant).square().mean().sqrt()
            assert (left - constant).abs().max() < 0.01 * before
            shares.append(float(constant.abs() / before))
    print(f"bias along s: {min(shares):.2%} to {max(shares):.2%} of what was projected out")


def test_cancel_ends_it_within_a_batch(pack, comfy_model):
    import comfy.model_management as management

    steps = []

    def cancel_at_the_second(step):
        steps.append(step.index)
        if step.index == 2:
            management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        pack("fmn.methods.casteer").run(
            comfy_model, [concept(pack)], few(pack, pairs=5, batch=1), cancel_at_the_second
        )
    assert steps == [1, 2]
    assert leftovers(comfy_model.patcher.model) == []
