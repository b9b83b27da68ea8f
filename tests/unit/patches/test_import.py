"""Other tools' erasers, written as these tools write them, read back as the same change."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.models.families import DEMO, SD1, SDXL, layers, text_layers
from fmn.patches.foreign_file import read_foreign
from fmn.patches.import_patch import guess_concept, import_patch
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.weight_difference import read_folder, spectral_rank

DOG = [Concept("dog")]
KV = [layer for layer in layers(DEMO) if layer.is_key_or_value]


def factors(layer, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(layer.shape[0], rank, generator=generator)
    return up, torch.randn(rank, *layer.shape[1:], generator=generator)


def kohya(layer, up, down):
    name = "lora_unet_" + layer.name.replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


def kohya_compvis(layer, up, down):
    name = "lora_unet_" + layer.compvis.replace(".", "_")
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


def peft(layer, up, down):
    return {f"unet.{layer.name}.lora_B.weight": up, f"unet.{layer.name}.lora_A.weight": down}


def peft_raw(layer, up, down):
    name = f"base_model.model.{layer.name}"
    return {f"{name}.lora_B.default.weight": up, f"{name}.lora_A.default.weight": down}


def processors(layer, up, down):
    block, _, part = layer.name.rpartition(".attn2.")
    name = f"unet.{block}.attn2.processor.{part.removesuffix('.0')}_lora"
    return {f"{name}.up.weight": up, f"{name}.down.weight": down}


def old_diffusers(layer, up, down):
    name = f"unet.{layer.name}.lora_linear_layer"
    return {f"{name}.up.weight": up, f"{name}.down.weight": down}


def comfyui(layer, up, down):
    name = f"diffusion_model.{layer.compvis}"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


LAYOUTS = [kohya, kohya_compvis, peft, peft_raw, processors, old_diffusers, comfyui]


def write(path, tensors, metadata=None):
    if path.suffix == ".safetensors":
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_loras_of_any_layout_are_the_same_patch(tmp_path, layout, ending):
    tensors = {}
    for seed, layer in enumerate(KV):
        tensors |= layout(layer, *factors(layer, seed=seed))
    patch = import_patch(write(tmp_path / f"dog{ending}", tensors), DOG).patch
    assert patch.family is DEMO and len(patch.changes) == len(KV)
    for seed, layer in enumerate(KV):
        up, down = factors(layer, seed=seed)
        assert torch.equal(patch.change_of(layer.name), up @ down)


@pytest.mark.parametrize("alpha, factor", [(None, 1.0), (1.0, 0.5), (2.0, 1.0), (4.0, 2.0)])
def test_alpha_over_rank_scales_the_change(tmp_path, alpha, factor):
    layer = KV[0]
    up, down = factors(layer)
    tensors = kohya(layer, up, down)
    if alpha is not None:
        tensors["lora_unet_" + layer.name.replace(".", "_") + ".alpha"] = torch.tensor(alpha)
    patch = import_patch(write(tmp_path / "a.safetensors", tensors), DOG, family="demo").patch
    torch.testing.assert_close(patch.change_of(layer.name), factor * up @ down)


def test_full_differences_keep_the_rank_they_have(tmp_path):
    layer = KV[0]
    up, down = factors(layer)
    tensors = {"lora_unet_" + layer.name.replace(".", "_") + ".diff": up @ down}
    patch = import_patch(write(tmp_path / "d.safetensors", tensors), DOG, family="demo").patch
    assert patch.ranks == [2]
    torch.testing.assert_close(patch.change_of(layer.name), up @ down, rtol=1e-4, atol=1e-4)


def test_convolutions_keep_their_kernel(tmp_path):
    layer = next(each for each in layers(SD1) if each.shape[2:] == (3, 3))
    up, down = factors(layer)
    file = write(tmp_path / "conv.safetensors", kohya(layer, up[:, :, None, None], down))
    patch = import_patch(file, DOG, family="sd1").patch
    expected = (up @ down.flatten(1)).view(layer.shape)
    torch.testing.assert_close(patch.change_of(layer.name), expected)


@pytest.mark.parametrize("start, family", [
    ("lora_te_", DEMO), ("text_encoder.", DEMO), ("lora_te1_", SDXL), ("lora_te2_", SDXL),
])  # fmt: skip
def test_text_encoder_layers(tmp_path, start, family):
    encoder = "text_encoder_2" if "2" in start else "text_encoder"
    layer = next(each for each in text_layers(family) if each.name.startswith(encoder + "."))
    path = layer.name.removeprefix(encoder + ".")
    name = start + (path.replace(".", "_") if start.endswith("_") else path)
    up, down = factors(layer)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    patch = import_patch(write(tmp_path / "te.safetensors", tensors), DOG, family=family.key).patch
    assert patch.changes_text and torch.equal(patch.change_of(layer.name), up @ down)


def demo_weights(prefix="", names="name"):
    base = load_file("../demo/fmn-demo.safetensors")
    return {
        f"{prefix}{getattr(layer, names)}.weight": base[
            f"model.diffusion_model.{layer.compvis}.weight"
        ].float()
        for layer in KV
    }


EDITED = {
    "UCE: partial U-Net": ("", "name", ".safetensors"),
    "ESD: pickle": ("", "name", ".pt"),
    "CompVis": ("model.diffusion_model.", "compvis", ".ckpt"),
    "pipeline": ("unet.", "name", ".bin"),
}


@pytest.mark.parametrize("prefix, names, ending", EDITED.values(), ids=EDITED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edited_weights_are_cut_at_the_gap(tmp_path, prefix, names, ending, dtype):
    """Three concepts of a closed form: rank 3, in any precision of the file."""
    weights, wanted = demo_weights(prefix, names), {}
    for seed, layer in enumerate(KV):
        up, down = factors(layer, 3, seed)
        wanted[layer.name] = 0.02 * up @ down
        weights[f"{prefix}{getattr(layer, names)}.weight"] += wanted[layer.name]
    file = write(tmp_path / f"uce{ending}", {k: w.to(dtype) for k, w in weights.items()})
    found = import_patch(file, DOG, base="../demo/fmn-demo.safetensors")
    assert {len(down) for _, down in found.patch.changes.values()} == {3}
    for name, change in wanted.items():
        error = (found.patch.change_of(name) - change).norm() / change.norm()
        assert error < (1e-3 if dtype == torch.float32 else 0.1)
    assert found.patch.info["base.fingerprint"] == "31a36f84a352c2c121951bd00dad75e7"


def test_a_rank_can_be_asked_for(tmp_path):
    weights = demo_weights()
    weights[f"{KV[0].name}.weight"] += 0.02 * torch.randn(KV[0].shape)
    file = write(tmp_path / "esd.safetensors", weights)
    found = import_patch(file, DOG, base="../demo/fmn-demo.safetensors", rank=5)
    assert found.patch.ranks == [5] and list(found.patch.changes) == [KV[0].name]
    assert 0 < found.patch.info["truncation_error"] < 1 and len(found.notes) == 2


def test_what_a_lora_cannot_hold_is_told(tmp_path):
    weights = demo_weights()
    weights[f"{KV[0].name}.weight"] += 0.02 * torch.ones(KV[0].shape)
    key = "model.diffusion_model.out.0.bias"
    weights[key] = load_file("../demo/fmn-demo.safetensors")[key].float() + 1
    found = import_patch(
        write(tmp_path / "esd.safetensors", weights), DOG, base="../demo/fmn-demo.safetensors"
    )
    assert any("a LoRA cannot hold" in note for note in found.notes)


def test_provenance_goes_into_the_file(tmp_path):
    layer = KV[0]
    metadata = {"prompts": '["dog"]', "fmn.scores": '{"UA": 1}'}
    file = write(tmp_path / "spm_dog.safetensors", kohya(layer, *factors(layer)), metadata)
    patch = import_patch(file, DOG, family="demo").patch
    loaded = load_patch(save_patch(patch, tmp_path / "patch.safetensors"))
    record = loaded.info["imported"]
    assert record["kind"] == "LoRA" and record["file"] == "spm_dog.safetensors"
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(metadata["prompts"])[0] in record["metadata"]
    assert "scores" not in loaded.info and "base.fingerprint" not in loaded.info
    assert loaded.info["method"] == "import" and loaded.concepts == ["dog"]


class Evil:
    def __reduce__(self):
        return print, ("run",)


def bad(name, content):
    def make(folder):
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    return make


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FLUX = {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(4, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4)}  # fmt: skip
BAD = {
    "LFS pointer": (bad("a.safetensors", LFS), "Git LFS pointer.*git lfs pull"),
    "LFS pointer as .pt": (bad("a.pt", LFS), "Git LFS pointer"),
    "web page": (bad("a.safetensors", b"<!DOCTYPE html><html>"), "web page"),
    "web page with space": (bad("a.ckpt", b"\n\n <HTML lang=en>"), "web page"),
    "empty": (bad("a.pt", b""), "empty"),
    "noise": (bad("a.bin", bytes(range(1, 200))), "not begin like one"),
    "cut zip": (bad("a.pt", b"PK\x03\x04" + bytes(90)), "damaged"),
    "raw pickle": (bad("a.pt", {"unet": Evil()}), "could run code"),
    "a tensor alone": (bad("a.pt", torch.ones(3)), "not layers by name"),
    "a list of vectors": (bad("a.pt", [torch.ones(3)]), "not layers by name"),
    "settings": (bad("a.pt", {"steps": 3}), "no tensors"),
    "LoHa": (bad("a.pt", {"lora_unet_a.hada_w1_a": torch.ones(2, 2)}), "LoHa"),
    "LoKr": (bad("a.pt", {"lora_unet_a.lokr_w1": torch.ones(2, 2)}), "LoKr"),
    "DoRA": (bad("a.pt", {"unet.a.dora_scale": torch.ones(2, 2)}), "DoRA"),
    "Flux LoRA": (bad("a.pt", FLUX), "diffusion transformer"),
    "VAE": (bad("a.pt", {"first_stage_model.encoder.conv_in.weight": torch.ones(2)}), "is a VAE"),
    "embedding": (bad("a.pt", {"emb_params": torch.ones(2, 4)}), "embedding"),
    "ControlNet": (bad("a.pt", {"control_model.input.weight": torch.ones(2)}), "is a ControlNet"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_named(tmp_path, make, message):
    with pytest.raises(ForgetError, match=message) as caught:
        import_patch(make(tmp_path), DOG)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_a_header_as_long_as_a_pickle_begins(tmp_path, length):
    """The first two bytes of both are the same."""
    tensors = '{"unet.a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = length.to_bytes(8, "little") + tensors.ljust(length).encode() + bytes(4)
    (tmp_path / "a.safetensors").write_bytes(data)
    assert data[:2] in (b"\x80\x02", b"\x80\x04")
    assert list(read_foreign(tmp_path / "a.safetensors").tensors) == ["unet.a.weight"]


def test_hidden_files_of_a_folder_are_left_alone(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet" / "._diffusion_pytorch_model.safetensors").write_bytes(b"\0\5\x16\7")
    assert list(read_folder(tmp_path).tensors) == ["unet.a"]


def test_missing_facts_are_asked_for(tmp_path):
    weights = demo_weights()
    file = write(tmp_path / "esd-van_gogh-x_1.pt", weights)
    with pytest.raises(ForgetError, match='--concept, perhaps "van gogh"'):
        import_patch(file, [])
    with pytest.raises(ForgetError, match="--base"):
        import_patch(file, DOG)
    with pytest.raises(ForgetError, match="equals the base"):
        import_patch(file, DOG, base="../demo/fmn-demo.safetensors")
    far = write(tmp_path / "far.pt", {key: torch.randn_like(w) for key, w in weights.items()})
    with pytest.raises(ForgetError, match="too much for an edit"):
        import_patch(far, DOG, base="../demo/fmn-demo.safetensors")
    with pytest.raises(ForgetError, match="no family 'flux'"):
        import_patch(file, DOG, family="flux")


@pytest.mark.parametrize("values, rank", [
    ([5.0, 4.0, 3.0, 0.01, 0.009, 0.008], 3),
    ([1.0, 1e-6], 1),
    ([2.0], 1),
    ([1 / (1 + i) ** 0.5 for i in range(200)], 64),
])  # fmt: skip
def test_spectral_rank(values, rank):
    assert spectral_rank(torch.tensor(values)) == rank


def test_guesses(tmp_path):
    for name, guess in [("erased-van_gogh.pt", "van gogh"), ("LECO_robot_last.pt", "robot")]:
        assert guess_concept(read_foreign(write(tmp_path / name, {"a": torch.ones(1)}))) == guess
