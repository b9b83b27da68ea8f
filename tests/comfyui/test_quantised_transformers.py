"""Re-read on transformers whose weights are in 8 bits, as ComfyUI's stock loader makes them."""

import pytest
import torch

from .others import WIDTH, Words, esd_settings, make
from .parts import concept
from .test_quantised import FP8, loaded, written_as
from .test_transformer_table import encoded, latents, predictions
from .test_transformers import reread_settings

KINDS = {
    "fp8": "float8_e4m3fn", "scaled": "float8_e4m3fn", "mixed": "float8_e4m3fn",
    "int8": "int8",
}  # fmt: skip


@pytest.fixture(params=KINDS)
def quantised(request, pack, tmp_path):
    """(name of its format, host of a tiny Stable Diffusion 3)."""
    from comfy.quant_ops import QUANT_ALGOS

    kind = request.param
    if kind == "int8" and "int8_tensorwise" not in QUANT_ALGOS:
        pytest.skip("This ComfyUI has no int8.")
    # The loader takes a model to have as many blocks as its width has 64.
    context = {"in_features": WIDTH, "out_features": 128}
    embedder = {"target": "torch.nn.Linear", "params": context}
    whole = make("SD3", {"depth": 2, "context_embedder_config": embedder}).model.diffusion_model
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    path = written_as("plain" if kind == "fp8" else kind, weights, tmp_path)
    patcher = loaded(path, FP8 if kind == "fp8" else None)
    return KINDS[kind], pack("fmn.hosts.comfyui.unknown_model").host_of(patcher, Words())


def content(model):
    """Every weight's bytes."""
    values = {key: getattr(value, "_qdata", value) for key, value in model.state_dict().items()}
    return {
        key: value.detach().clone().contiguous().reshape(-1).view(torch.uint8)
        for key, value in values.items()
    }


def check_unchanged(model, before):
    after = content(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["reread", "uce"])
def test_methods_solve_on_them_as_they_are(pack, quantised, tmp_path, method):
    import comfy.sd
    import comfy.utils

    form, host = quantised
    model, wrong = host.patcher.model, pack("fmn.errors").ForgetError
    weight = model.diffusion_model.joint_blocks[0].x_block.attn.proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype is FP8
    before = content(model)
    settings, layers = reread_settings(pack), host.family.readers()
    if method == "uce":
        settings = pack("fmn.methods.uce").Settings(keep_list="none")
        layers = host.family.text_readers()
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(host, [concept(pack)], settings)
    assert patch.changes.keys() == layers.keys()
    assert patch.info["loss"]["last"] < 0.9
    check_unchanged(model, before)

    patches, adapter = pack("fmn.patches.patch"), pack("fmn.models.adapters")
    loaded_patch = patches.load_patch(patches.save_patch(patch, tmp_path / "patch.safetensors"))
    lora = comfy.utils.load_torch_file(str(tmp_path / "patch.safetensors"))
    x, texts = latents(host, 2), encoded(pack, host, "a cat", "a cat here")
    plain = predictions(host, x, texts)
    fixed = {
        layer: adapter.FixedAdapter([(up, down, 1.0)], "cpu")
        for layer, (up, down) in loaded_patch.changes.items()
    }
    exact = predictions(host, x, texts, fixed, adapter) - plain
    stock, _ = comfy.sd.load_lora_for_models(host.patcher, None, lora, 1.0, 0.0)
    ways = [
        predictions(type(host)(way), x, texts) - plain
        for way in (host.patched(loaded_patch, 1.0), stock)
    ]
    # ComfyUI rounds a merged weight to 8 bits again, and at random.
    for way in ways:
        assert torch.cosine_similarity(way.flatten(), exact.flatten(), 0) > 0.8
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):  # ComfyUI 0.33's Load LoRA (Bypass)
        beside, _ = comfy.sd.load_bypass_lora_for_models(host.patcher, None, lora, 1.0, 0.0)
        way = predictions(type(host)(beside), x, texts) - plain
        assert (way - exact).norm() < 1e-2 * exact.norm()
    predictions(host, x, texts)  # loads the unpatched model again
    check_unchanged(model, before)

    with pytest.raises(wrong, match=f"quantised .* is {form}") as refused:
        pack("fmn.methods").forget(host, [concept(pack)], esd_settings(pack))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("last", [1, 4])
def test_cancel_and_error_leave_them_as_they_were(pack, quantised, last):
    import comfy.model_management as management

    _, host = quantised
    before = content(host.patcher.model)
    for error in (management.InterruptProcessingException, RuntimeError):

        def stop(step, error=error):
            if step.index == last:
                raise error

        with torch.inference_mode(), pytest.raises(error):
            pack("fmn.methods").forget(host, [concept(pack)], reread_settings(pack), stop)
        check_unchanged(host.patcher.model, before)
