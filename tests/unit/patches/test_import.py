"""Other tools' erasers, written as these tools write them, read back as the same change."""

import hashlib
import io
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.models.families import DEMO, SD1, SDXL, layers, text_layers
from fmn.patches.foreign_file import read_folder, read_foreign
from fmn.patches.import_patch import guess_concept, import_patch
from fmn.patches.patch import load_patch, save_patch
from fmn.patches.weight_difference import spectral_rank

from .erasers import KV, LAYOUTS, demo_weights, factors, kohya, peft, peft_raw, write

DOG = [Concept("dog")]


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
    with pytest.raises(ForgetError, match='--concept., perhaps "van gogh"'):
        import_patch(file, [])
    with pytest.raises(ForgetError, match="--base"):
        import_patch(file, DOG)
    with pytest.raises(ForgetError, match="equals the base"):
        import_patch(file, DOG, base="../demo/fmn-demo.safetensors")
    far = write(tmp_path / "far.pt", {key: torch.randn_like(w) for key, w in weights.items()})
    with pytest.raises(ForgetError, match="too much for an edit"):
        import_patch(far, DOG, base="../demo/fmn-demo.safetensors")
    with pytest.raises(ForgetError, match="no family 'flux9'"):
        import_patch(file, DOG, family="flux9")
    with pytest.raises(ForgetError, match="no LoRA, and nothing else can be imported for Flux.1"):
        import_patch(file, DOG, family="flux")


@pytest.mark.parametrize("values, rank", [
    ([5.0, 4.0, 3.0, 0.01, 0.009, 0.008], 3),
    ([1.0, 1e-6], 1),
    ([2.0], 1),
    ([1 / (1 + i) ** 0.5 for i in range(200)], 64),
    ([1.0] * 90 + [1e-4] * 10, 90),
    ([1.0] + [0.3 * 0.9**i for i in range(30)], 18),  # as ESD's file had it
    ([1.0] * 99 + [1e-4], 64),  # the smallest value of a square matrix
])  # fmt: skip
def test_spectral_rank(values, rank):
    assert spectral_rank(torch.tensor(values)) == rank


def test_guesses(tmp_path):
    for name, guess in [("erased-van_gogh.pt", "van gogh"), ("LECO_robot_last.pt", "robot")]:
        assert guess_concept(read_foreign(write(tmp_path / name, {"a": torch.ones(1)}))) == guess


def test_files_of_torch_before_1_6_and_compressed_ones(tmp_path):
    tensors, old = kohya(KV[0], *factors(KV[0])), tmp_path / "old.pt"
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    patch = import_patch(old, DOG, family="demo").patch
    up, down = factors(KV[0])
    assert torch.equal(patch.change_of(KV[0].name), up @ down)
    packed = io.BytesIO()
    torch.save(tensors, tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    (tmp_path / "bomb.pt").write_bytes(packed.getvalue())
    with pytest.raises(ForgetError, match="damaged"):
        import_patch(tmp_path / "bomb.pt", DOG)


@pytest.mark.parametrize("file, metadata, config", [
    ("a.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 2}'}, None),
    ("adapter_model.safetensors", None, '{"lora_alpha": 8, "r": 2}'),
])  # fmt: skip
def test_peft_keeps_alpha_beside_the_tensors(tmp_path, file, metadata, config):
    up, down = factors(KV[0])
    path = write(tmp_path / file, peft_raw(KV[0], up, down), metadata)
    if config:
        (tmp_path / "adapter_config.json").write_text(config)
    patch = import_patch(tmp_path if config else path, DOG, family="demo").patch
    torch.testing.assert_close(patch.change_of(KV[0].name), 4 * up @ down)
    if config:
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "use_rslora": true}')
        with pytest.raises(ForgetError, match="use_rslora"):
            import_patch(path, DOG, family="demo")


def edit(layer):
    up, down = factors(layer, 1)
    return 0.01 * up @ down.flatten(1)


def folder_of(tmp_path, parts):
    for name, tensors in parts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, tensors)
    return tmp_path


def test_folders_of_every_tool(tmp_path):
    """MACE's pipeline in shards, EraseFlow's LoRA, AdvUnlearn's text encoder."""
    layer, text = KV[0], text_layers(DEMO)[0]
    weights = demo_weights()
    weights[f"{layer.name}.weight"] += edit(layer)
    first, second = dict(list(weights.items())[:5]), dict(list(weights.items())[5:])
    stem, weight_name = "unet/diffusion_pytorch_model", f"{text.name.partition('.')[2]}.weight"
    base = load_file("../demo/fmn-demo.safetensors")
    key = next(key for key in base if key.endswith(weight_name))
    encoder = {weight_name: base[key].float() + edit(text)}
    mace = folder_of(tmp_path / "mace", {
        f"{stem}-00001-of-00002.safetensors": first, f"{stem}-00002-of-00002.safetensors": second,
        f"{stem}.fp16.safetensors": {"wrong": torch.ones(1)}, "vae/model.bin": {"a": torch.ones(1)},
        "text_encoder/model.safetensors": encoder, "text_encoder/pytorch_model.bin": encoder,
    })  # fmt: skip
    patch = import_patch(mace, DOG, base="../demo/fmn-demo.safetensors").patch
    assert set(patch.changes) == {layer.name, text.name} and patch.ranks == [1]
    (mace / f"{stem}-00002-of-00002.safetensors").unlink()
    with pytest.raises(ForgetError, match="1 of 2 parts"):
        import_patch(mace, DOG, base="../demo/fmn-demo.safetensors")
    lora = {"pytorch_lora_weights.safetensors": peft(layer, *factors(layer))}
    assert import_patch(folder_of(tmp_path / "flow", lora), DOG, family="demo").kind == "LoRA"
    adv = folder_of(tmp_path / "dog_unlearned", {"model.safetensors": encoder})
    found = import_patch(adv, DOG, base="../demo/fmn-demo.safetensors").patch
    assert list(found.changes) == [text.name]
    with pytest.raises(ForgetError, match="several files of weights"):
        import_patch(folder_of(tmp_path / "two", {"a.pt": lora, "b.pt": lora}), DOG)


def test_esd_u_has_no_keys_of_cross_attention(tmp_path):
    """Layers that two families share: the base says which."""
    base = load_file("../demo/fmn-demo.safetensors")
    layer = next(one for one in layers(DEMO) if one.name.endswith("attn1.to_q"))
    name, path = f"{layer.name}.weight", f"model.diffusion_model.{layer.compvis}"
    bias = f"{layer.name.replace('to_q', 'to_out.0')}.bias"
    weights = {name: base[f"{path}.weight"].float() + edit(layer)}
    weights[bias] = base[f"{path.replace('to_q', 'to_out.0')}.bias"].float() + 1
    file = write(tmp_path / "esd-dog-esdu.safetensors", weights | {"odd.weight": torch.ones(2)})
    found = import_patch(file, DOG, base="../demo/fmn-demo.safetensors")
    assert list(found.patch.changes) == [layer.name]
    # The bias has another name in the base, and is found all the same.
    assert found.patch.info["imported"]["not_held"] > 0.5
    assert any("1 tensors have other names" in note for note in found.notes)
