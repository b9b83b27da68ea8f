"""Methods that solve on GGUF files, by the classes of city96's ComfyUI-GGUF, not a part of this.

GGUF_PATH names a copy of that pack; it needs the package gguf.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .others import WIDTH, Words, esd_settings, make
from .parts import concept, leftovers
from .reduced import known, write_checkpoint
from .test_quantised import SOLVED, clip_of, loaded, saved_as
from .test_transformer_table import changes_by_way
from .test_transformers import reread_settings

pytestmark = pytest.mark.skipif(
    "GGUF_PATH" not in os.environ,
    reason="needs a copy of ComfyUI-GGUF, which GGUF_PATH names (CONTRIBUTING.md)",
)


@pytest.fixture(scope="module")
def gguf_pack(pack):
    """The other pack's module of nodes."""
    pytest.importorskip("gguf")
    folder, name = Path(os.environ["GGUF_PATH"]), "gguf_pack"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.nodes")


FORMS = "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"
# Of a block of 256 numbers: the bytes of its float16 factors, and their sizes for numbers of
# about 1: one for what is stored, one for what is taken off.
K_FACTORS = {"Q4_K": ((0, 1 / 160), (2, 7.5 / 160)), "Q5_K": ((0, 1 / 320), (2, 15.5 / 320)),
             "Q6_K": ((208, 1 / 1350),)}  # fmt: skip


def random_k_blocks(tensor, form):
    """Any bytes are a matrix in a K-quant, which gguf reads and does not write: random ones, whose
    factors give numbers of the tensor's size."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form]]
    rows, columns = tensor.shape
    random = np.random.default_rng(columns)
    data = random.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place, factor in K_FACTORS[form]:
        value = np.float16(factor * float(tensor.float().std()))
        data[..., place : place + 2] = np.frombuffer(value.tobytes(), np.uint8)
    return data.reshape(rows, -1)


def written(weights, form, path, architecture="sd3"):
    """A GGUF file of a model whose matrices are in a form of 8 to 4 bits."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, tensor in weights.items():
        matrix = tensor.dim() == 2 and key.endswith(".weight")
        fits = matrix and tensor.shape[1] % (256 if form in K_FACTORS else 32) == 0
        kind = gguf.GGMLQuantizationType[form if fits else "F32"]
        if fits and form in K_FACTORS:
            data = random_k_blocks(tensor, form)
        else:
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=FORMS)
def host(request, pack, gguf_pack, monkeypatch, tmp_path):
    """Of a tiny model by the node Unet Loader (GGUF)."""
    # The loader takes a model to have as many blocks as its width has 64; a K-quant needs 256.
    depth = 4 if request.param in K_FACTORS else 2
    context = {"in_features": WIDTH, "out_features": 64 * depth}
    embedder = {"target": "torch.nn.Linear", "params": context}
    sizes = {"depth": depth, "num_blocks": depth}
    whole = make("SD3", sizes | {"context_embedder_config": embedder}).model.diffusion_model
    path = tmp_path / "model.gguf"
    written(whole.state_dict(), request.param, path)
    monkeypatch.setattr(gguf_pack.folder_paths, "get_full_path", lambda *names: str(path))
    with torch.inference_mode():
        (patcher,) = gguf_pack.UnetLoaderGGUF().load_unet("model.gguf")
    return pack("fmn.hosts.comfyui.unknown_model").host_of(patcher, Words())


@pytest.mark.parametrize("form", FORMS)
def test_methods_solve_on_a_u_net(pack, gguf_pack, monkeypatch, tmp_path, form):
    """The same patch as on the numbers that the file stands for."""
    import gguf

    checkpoint = write_checkpoint(tmp_path / "sd1.safetensors", "sd1")
    path, meant = tmp_path / "model.gguf", {}
    weights = load_file(saved_as("plain", checkpoint, tmp_path))
    written(weights, form, path, "sd1")
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        meant[tensor.name] = values.reshape(weights[tensor.name].shape)
    save_file(meant, tmp_path / "meant.safetensors")
    monkeypatch.setattr(gguf_pack.folder_paths, "get_full_path", lambda *names: str(path))
    with known(pack, monkeypatch, "sd1"), torch.inference_mode():
        (patcher,) = gguf_pack.UnetLoaderGGUF().load_unet("model.gguf")
        clip, host = clip_of(checkpoint), pack("fmn.hosts.comfyui.model").ComfyModel
        packed, whole = host(patcher, clip), host(loaded(tmp_path / "meant.safetensors"), clip)
        before = content(packed.patcher.model)
        hash_model = pack("fmn.jobs.recipe").hash_model
        assert hash_model(packed) == hash_model(packed) != hash_model(whole)
        for method, given in SOLVED.items():
            chosen = pack(f"fmn.methods.{method}").Settings(**given)
            found, wanted = (
                pack("fmn.methods").forget(model, [concept(pack)], chosen)
                for model in (packed, whole)
            )
            for name in wanted.changes:
                change = wanted.change_of(name)
                error = (found.change_of(name) - change).norm() / change.norm()
                assert error < 0.02, (method, name)
    after = content(packed.patcher.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not leftovers(packed.patcher.model)


def content(model):
    return {
        name: tensor.data.as_subclass(torch.Tensor).clone().flatten().view(torch.uint8)
        for name, tensor in model.named_parameters()
    }


def test_reread_trains_on_them_as_they_are(pack, host, tmp_path):
    model, wrong = host.patcher.model, pack("fmn.errors").ForgetError
    assert model.diffusion_model.joint_blocks[0].x_block.attn.proj.weight.dtype is torch.uint8
    before = content(model)
    hash_model = pack("fmn.jobs.recipe").hash_model
    assert hash_model(host) == hash_model(host)  # which a batch needs

    def check_unchanged():
        after = content(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    with torch.inference_mode():
        patch = pack("fmn.methods").forget(host, [concept(pack)], reread_settings(pack))
    assert patch.changes.keys() == host.family.readers().keys()
    assert patch.info["loss"]["last"] < 0.9
    assert not leftovers(model)  # ComfyUI's Load LoRA (Bypass), below, leaves some
    check_unchanged()

    path = pack("fmn.patches.patch").save_patch(patch, tmp_path / "patch.safetensors")
    _, exact, changes = changes_by_way(pack, host, path)
    for way in ("Apply Forget Patch", "Load LoRA"):
        # Patches are added to the weights as they are unpacked, and nothing is rounded again.
        assert (changes[way] - exact).norm() < 1e-2 * exact.norm()
    check_unchanged()

    with pytest.raises(wrong, match="quantised .* is uint8"):
        pack("fmn.methods").forget(host, [concept(pack)], esd_settings(pack))
