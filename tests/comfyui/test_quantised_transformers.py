"""Re-read on transformers whose weights are in 8 bits, as ComfyUI's stock loader makes them."""

import pytest
import torch

from .others import WIDTH, Words, esd_settings, make
from .parts import concept
from .test_quantised import FP8, check_unchanged, content, loaded, written_as
from .test_transformer_table import changes_by_way
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


@pytest.mark.parametrize("method", ["reread", "uce"])
def test_methods_solve_on_them_as_they_are(pack, quantised, tmp_path, method):
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

    path = pack("fmn.patches.patch").save_patch(patch, tmp_path / "patch.safetensors")
    _, exact, changes = changes_by_way(pack, host, path)
    for way, change in changes.items():
        if "Bypass" in way:
            assert (change - exact).norm() < 1e-2 * exact.norm()
        else:  # ComfyUI rounds a merged weight to 8 bits again, and at random
            assert torch.cosine_similarity(change.flatten(), exact.flatten(), 0) > 0.8
    check_unchanged(model, before)

    with pytest.raises(wrong, match=f"quantised .* is {form}") as refused:
        pack("fmn.methods").forget(host, [concept(pack)], esd_settings(pack))
    assert len(str(refused.value)) < 300


def test_a_batch(pack, quantised, tmp_path):
    _, host = quantised
    before, batch = content(host.patcher.model), pack("fmn.jobs.batch")
    chosen = pack("fmn.methods.uce").Settings(keep_list="none")
    for existing in (0, 2):  # the same model again, so the same files
        with torch.inference_mode():
            words = [concept(pack, name) for name in ("dog", "cat")]
            made = batch.forget_each(host, words, chosen, tmp_path)
        assert len(made.files) == 2 and len(made.existing) == existing and not made.failed
    check_unchanged(host.patcher.model, before)


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
