"""Re-read on diffusion transformers: ComfyUI's own classes, tiny and with random weights.

The text side is a mock, ``others.Words``: random conditioning in the shape that the model's own
text encoders give.
"""

import pytest
import torch

from .parts import concept


def reread_settings(pack, **more):
    changes = {"transformer_prompts": 2, "keep_prompts": 6, "query_positions": 4, "size": 64}
    return pack("fmn.methods.reread.settings").Settings(**changes | more)


def unchanged(model, before):
    """The same bits, and no hook left."""
    after = model.patcher.model.state_dict()
    hooked = any(module._forward_hooks for module in model.patcher.model.modules())
    return not hooked and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 4], ids=["recording", "with edits"])
def test_a_model_comes_back_after_error_and_cancel(pack, other_host, fault, step):
    model = other_host("Flux")
    before = {key: value.clone() for key, value in model.patcher.model.state_dict().items()}

    def stop(progress):
        if progress.index == step:
            raise fault

    with torch.inference_mode(), pytest.raises(fault):
        pack("fmn.methods").forget(model, [concept(pack)], reread_settings(pack), stop)
    assert unchanged(model, before)


def test_a_concept_that_is_encoded_as_nothing_is_refused(pack, other_host, monkeypatch):
    model = other_host("Flux")
    encode, Prompt = model.encode, pack("fmn.concepts.concept").Prompt
    monkeypatch.setattr(model, "encode", lambda prompt: encode(Prompt("a cat", "")))
    with torch.inference_mode(), pytest.raises(pack("fmn.errors").ForgetError, match="encoded as"):
        pack("fmn.methods").forget(model, [concept(pack)], reread_settings(pack))


@pytest.mark.parametrize(("name", "layers"), [("Flux", 4), ("SD3", 3), ("Lumina2", 1)])
def test_reread_solves_from_recorded_rows(pack, other_host, name, layers):
    model = other_host(name)
    before = {key: value.clone() for key, value in model.patcher.model.state_dict().items()}
    steps = []
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(
            model, [concept(pack)], reread_settings(pack), steps.append
        )
    assert len(patch.changes) == layers and patch.info["loss"]["last"] < 0.9
    assert unchanged(model, before)
    assert [step.index for step in steps] == list(range(1, steps[0].total + 1))


def test_what_a_feed_forward_part_gives_is_not_changed(pack, other_host):
    """Flux's single blocks project attention and feed-forward part together."""
    model = other_host("Flux")
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(model, [concept(pack)], reread_settings(pack))
    fused = {name: down for name, (_, down) in patch.changes.items() if "linear2" in name}
    assert fused
    for name, down in fused.items():
        width = len(patch.change_of(name))
        assert down.shape[1] > width and down[:, :width].any() and not down[:, width:].any()


@pytest.mark.parametrize(("method", "layers"), [("reread", 7), ("uce", 2)])
def test_both_hosts_solve_for_the_same_patch(pack, method, layers):
    """The demo transformer, forgotten in ComfyUI and in diffusers."""
    settings = reread_settings(pack, size=0)
    if method == "uce":
        settings = pack("fmn.methods.uce").Settings(keep_list="none")
    with torch.inference_mode():
        host_of = pack("fmn.hosts.comfyui.unknown_model").host_of
        ours = host_of(*pack("nodes.demo").load_demo_transformer())
    theirs = pack("fmn.hosts.diffusers.transformer").DiffusersTransformer.load_demo()
    forget = pack("fmn.methods").forget
    first, second = (forget(model, [concept(pack)], settings) for model in (ours, theirs))
    assert first.changes.keys() == second.changes.keys() and len(first.changes) == layers
    assert first.info["base.fingerprint"] == second.info["base.fingerprint"]
    for name in first.changes:
        torch.testing.assert_close(
            first.change_of(name), second.change_of(name), rtol=1e-2, atol=1e-4
        )


def test_a_demo_transformer_that_is_missing_is_refused(pack, tmp_path):
    with pytest.raises(pack("fmn.errors").ForgetError, match="missing at .*dit.*install"):
        pack("nodes.demo").load_demo_transformer(tmp_path / "dit.safetensors")


def test_kernels_have_a_gradient_while_a_model_is_borrowed(pack, other_host, monkeypatch):
    import comfy.model_management as management

    monkeypatch.setattr(management, "in_training", False, raising=False)
    with torch.inference_mode(False), other_host("Flux").borrow_denoiser():
        assert management.in_training
    assert not management.in_training


def test_kernels_without_a_gradient_are_refused_in_words(pack, other_host):
    """As ComfyUI 0.33 has them in Anima and Ernie Image, by torch's message."""
    wrong, host = pack("fmn.errors").ForgetError, other_host("Flux")
    refused = pytest.raises(wrong, match="Flux.1 by functions without a gradient.*use Re-read")
    with refused, host.borrow_denoiser():
        raise RuntimeError("Trying to backward through x but no autograd formula was registered")
    with pytest.raises(RuntimeError, match="^another$"), host.borrow_denoiser():
        raise RuntimeError("another")
