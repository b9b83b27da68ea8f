import json
import os
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fmn
from fmn.errors import ForgetError
from fmn.models.families import DEMO, SD1, SD2, SDXL, layers, text_layers
from fmn.patches.checkpoint import checkpoint_family, merge_into_checkpoint
from fmn.patches.foreign_file import read_foreign
from fmn.patches.patch import ForgetPatch
from fmn.patches.weight_names import UNET_PREFIX

from ..tiny import make_patch, metadata_of, same_tensors

DEMO_FILE = Path(fmn.__file__).parent.parent / "demo" / "fmn-demo.safetensors"
METADATA = {"format": "pt", "modelspec.title": "a merge of mine"}


def key_values(family):
    return [layer for layer in layers(family) if layer.is_key_or_value]


def key_of(layer):
    return f"{UNET_PREFIX}{layer.compvis}.weight"


def negated(patch):
    changes = {name: (-up, down) for name, (up, down) in patch.changes.items()}
    return ForgetPatch(patch.family, changes, patch.info)


@pytest.fixture(params=[torch.float16, torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def write_checkpoint(path, dtype=torch.float32, family=DEMO):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        key_of(layer): torch.randn(layer.shape, generator=generator).to(dtype)
        for layer in key_values(family)
    }
    tensors["model.diffusion_model.time_embed.0.weight"] = torch.randn(8, 8, generator=generator)
    tensors["cond_stage_model.transformer.position_ids"] = torch.arange(77)
    tensors["first_stage_model.odd"] = torch.tensor([torch.nan, torch.inf, -0.0])
    save_file(tensors, path, metadata=METADATA)
    return path


@pytest.fixture
def source(tmp_path, dtype):
    return write_checkpoint(tmp_path / "source.safetensors", dtype)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "merged" / "target.safetensors"


def test_family_of_the_demo_file():
    assert checkpoint_family(read_foreign(DEMO_FILE)) is DEMO


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.key)
def test_family_by_shapes(tmp_path, family):
    header, end = {}, 0
    for layer in key_values(family):
        start, end = end, end + prod(layer.shape)
        header[key_of(layer)] = {"dtype": "U8", "shape": layer.shape, "data_offsets": [start, end]}
    text, path = json.dumps(header).encode(), tmp_path / "checkpoint.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # a hole: no space is taken
    assert checkpoint_family(read_foreign(path)) is family


def test_unknown_checkpoint(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.a.attn2.to_k.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ForgetError, match="of no known kind, not a supported checkpoint"):
        checkpoint_family(read_foreign(path))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(100)])
def test_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ForgetError, match="damaged.safetensors' is (damaged|empty)"):
        checkpoint_family(read_foreign(path))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ForgetError, match="none.safetensors"):
        checkpoint_family(read_foreign(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_only_patched_layers_change(source, target, dtype, strength):
    patch = make_patch()
    kept = key_values(DEMO)[0]
    del patch.changes[kept.name]
    merge_into_checkpoint(source, [(patch, strength)], target)
    before, after = load_file(source), load_file(target)
    patched = [layer for layer in key_values(DEMO) if layer is not kept]
    for layer in patched:
        key = key_of(layer)
        expected = (before.pop(key).float() + strength * patch.change_of(layer.name)).to(dtype)
        assert torch.equal(after.pop(key), expected)
    assert len(before) == 4 and same_tensors(before, after)
    assert metadata_of(target) == METADATA


def test_the_demo_checkpoint(tmp_path):
    patch, target = make_patch(rank=1), tmp_path / "merged.safetensors"
    merge_into_checkpoint(DEMO_FILE, [(patch, 1.0)], target)
    before, after = load_file(DEMO_FILE), load_file(target)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key_of(layer) for layer in key_values(DEMO)}
    assert before.keys() == after.keys() and metadata_of(target) == metadata_of(DEMO_FILE)
    assert checkpoint_family(read_foreign(target)) is DEMO


def test_strengths_add_up(tmp_path, target):
    source = write_checkpoint(tmp_path / "source.safetensors")
    one, other = make_patch(seed=1), make_patch(seed=2)
    merge_into_checkpoint(source, [(one, 0.7), (other, -0.2), (one, 0.1)], target)
    before, after = load_file(source), load_file(target)
    for layer in key_values(DEMO):
        change = 0.8 * one.change_of(layer.name) - 0.2 * other.change_of(layer.name)
        torch.testing.assert_close(after[key_of(layer)], before[key_of(layer)] + change)


def test_patches_of_different_layers(tmp_path, target):
    source = write_checkpoint(tmp_path / "source.safetensors")
    keys = make_patch(scope=lambda layer: layer.name.endswith("attn2.to_k"))
    values = make_patch(scope=lambda layer: layer.name.endswith("attn2.to_v"))
    merge_into_checkpoint(source, [(keys, 1.0), (values, 1.0)], target)
    before, after = load_file(source), load_file(target)
    for layer in key_values(DEMO):
        change = (keys if layer.name in keys.changes else values).change_of(layer.name)
        assert torch.equal(after[key_of(layer)], before[key_of(layer)] + change)


def test_a_patch_and_its_negation_cancel(source, target):
    patch = make_patch()
    merge_into_checkpoint(source, [(patch, 1.0), (negated(patch), 1.0)], target)
    assert same_tensors(load_file(source), load_file(target))


def test_negation_undoes_a_merge(source, target, dtype):
    patch = make_patch()
    merge_into_checkpoint(source, [(patch, 1.0)], target)
    merge_into_checkpoint(target, [(negated(patch), 1.0)], target)
    before, after = load_file(source), load_file(target)
    for layer in key_values(DEMO):
        weight = before[key_of(layer)].float()
        error = (after[key_of(layer)].float() - weight).abs()
        # Two roundings, each to half a unit in the last place of a slightly larger number.
        assert bool((error <= 1.1 * torch.finfo(dtype).eps * (weight.abs() + 0.1)).all())


def test_no_patches_is_a_copy(source, target):
    merge_into_checkpoint(source, [], target)
    assert same_tensors(load_file(source), load_file(target))


def test_other_family_is_refused(tmp_path, target):
    source = write_checkpoint(tmp_path / "source.safetensors")
    patches = [(make_patch(), 1.0), (make_patch(SD1), 1.0)]
    with pytest.raises(
        ForgetError, match=r"for Stable Diffusion 1\.x, the model is Forget-Me-Not demo model"
    ):
        merge_into_checkpoint(source, patches, target)
    assert not target.exists()


def test_unwritable_target(tmp_path):
    source = write_checkpoint(tmp_path / "source.safetensors")
    with pytest.raises(ForgetError, match="'target.safetensors' could not be saved"):
        merge_into_checkpoint(source, [(make_patch(), 1.0)], source / "target.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def test_a_variant_with_another_input_layer_is_refused(tmp_path, target):
    """An inpainting checkpoint reads nine channels: its base's whole-U-Net patch does not fit."""
    source = write_checkpoint(tmp_path / "inpainting.safetensors")
    weights = load_file(source)
    key = f"{UNET_PREFIX}input_blocks.0.0.weight"
    weights[key] = torch.zeros(64, 9, 3, 3)
    save_file(weights, source)
    whole = make_patch(scope=lambda layer: layer.name == "conv_in")
    with pytest.raises(ForgetError, match=r"input_blocks.0.0.*\[64, 4, 3, 3\].*\[64, 9, 3, 3\]"):
        merge_into_checkpoint(source, [(whole, 1.0)], target)
    del weights[key]
    save_file(weights, source)
    with pytest.raises(ForgetError, match="missing in 'inpainting.safetensors'"):
        merge_into_checkpoint(source, [(whole, 1.0)], target)
    assert not target.exists()


def text_patch(family, part=".layers.0.", seed=0):
    """Random changes of the text encoders' layers with that part in their names."""
    generator, changes = torch.Generator().manual_seed(seed), {}
    for layer in text_layers(family):
        if part in layer.name:
            up = 0.01 * torch.randn(layer.shape[0], 2, generator=generator)
            changes[layer.name] = up, torch.randn(2, layer.shape[1], generator=generator)
    return ForgetPatch(family, changes, make_patch().info)


CLIP_L = {
    f"self_attn.{x}_proj": (f"self_attn.{x}_proj.weight", slice(None))
    for x in ("q", "k", "v", "out")
} | {f"mlp.{x}": (f"mlp.{x}.weight", slice(None)) for x in ("fc1", "fc2")}
PLACES = {
    # family: {part of the pipeline: (where its blocks lie, how wide, {layer: (key, rows)})}
    DEMO: {"text_encoder": ("cond_stage_model.transformer.text_model.encoder.layers", 128, CLIP_L)},
    SD1: {"text_encoder": ("cond_stage_model.transformer.text_model.encoder.layers", 768, CLIP_L)},
    SD2: {"text_encoder": ("cond_stage_model.model.transformer.resblocks", 1024, None)},
    SDXL: {
        "text_encoder": (
            "conditioner.embedders.0.transformer.text_model.encoder.layers", 768, CLIP_L,
        ),
        "text_encoder_2": ("conditioner.embedders.1.model.transformer.resblocks", 1280, None),
    },
}  # fmt: skip


def open_clip(width):
    return {
        "self_attn.q_proj": ("attn.in_proj_weight", slice(0, width)),
        "self_attn.k_proj": ("attn.in_proj_weight", slice(width, 2 * width)),
        "self_attn.v_proj": ("attn.in_proj_weight", slice(2 * width, 3 * width)),
        "self_attn.out_proj": ("attn.out_proj.weight", slice(None)),
        "mlp.fc1": ("mlp.c_fc.weight", slice(None)),
        "mlp.fc2": ("mlp.c_proj.weight", slice(None)),
    }


def write_text_checkpoint(path, family, block, monkeypatch):
    """Random weights of one block of each text encoder, and no U-Net: its family is given."""
    monkeypatch.setattr("fmn.patches.checkpoint.checkpoint_family", lambda path: family)
    generator, tensors = torch.Generator().manual_seed(3), {}
    for place, width, names in PLACES[family].values():
        shapes = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, (key, rows) in (names or open_clip(width)).items():
            shape = shapes.get(name, (width if rows == slice(None) else 3 * width, width))
            weight = torch.randn(shape, generator=generator)
            tensors.setdefault(f"{place}.{block}.{key}", weight.half())
        tensors[f"{place}.{block}.attn.in_proj_bias"] = torch.randn(3 * width, generator=generator)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("family", PLACES, ids=lambda family: family.key)
def test_text_layers_are_merged_where_the_family_keeps_them(tmp_path, target, family, monkeypatch):
    source = write_text_checkpoint(tmp_path / "source.safetensors", family, 2, monkeypatch)
    patch = text_patch(family, ".layers.2.")
    merge_into_checkpoint(source, [(patch, 0.5), (patch, 0.25)], target)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys() and len(patch.changes) == 6 * len(PLACES[family])
    expected = {key: value.float() for key, value in before.items()}
    for part, (place, width, names) in PLACES[family].items():
        for name, (key, rows) in (names or open_clip(width)).items():
            change = 0.75 * patch.change_of(f"{part}.text_model.encoder.layers.2.{name}")
            expected[f"{place}.2.{key}"][rows] += change
    for key, value in expected.items():
        assert after[key].dtype == before[key].dtype
        torch.testing.assert_close(after[key].float(), value, rtol=1e-3, atol=1e-4)
        assert key.endswith("bias") == torch.equal(after[key], before[key])


def test_values_alone_change_their_rows_of_the_fused_matrix(tmp_path, target, monkeypatch):
    source = write_text_checkpoint(tmp_path / "source.safetensors", SD2, 0, monkeypatch)
    merge_into_checkpoint(source, [(text_patch(SD2, ".layers.0.self_attn.v_proj"), 1.0)], target)
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    before, after = load_file(source).pop(key), load_file(target).pop(key)
    assert torch.equal(before[:2048], after[:2048])
    assert not torch.equal(before[2048:], after[2048:])


@pytest.mark.parametrize("family", PLACES, ids=lambda family: family.key)
def test_a_checkpoint_without_the_text_layer_is_refused(tmp_path, target, family, monkeypatch):
    source = write_text_checkpoint(tmp_path / "source.safetensors", family, 1, monkeypatch)
    name = family.texts[0].comfy
    with pytest.raises(
        ForgetError, match=rf"'{name}.*layers\.0\..*missing in 'source.safetensors'"
    ):
        merge_into_checkpoint(source, [(text_patch(family), 1.0)], target)
    assert not target.exists()


def test_a_text_layer_of_another_shape_is_refused(tmp_path, target, monkeypatch):
    source = write_text_checkpoint(tmp_path / "source.safetensors", SD2, 0, monkeypatch)
    weights = load_file(source)
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    save_file(weights | {key: weights[key][:2048].clone()}, source)
    with pytest.raises(
        ForgetError, match=r"v_proj' of shape \[1024, 1024\].*of shape \[2048, 1024\]"
    ):
        merge_into_checkpoint(source, [(text_patch(SD2, ".layers.0.self_attn.v"), 1.0)], target)


def test_the_demo_checkpoint_takes_both_parts(tmp_path):
    unet, text, target = make_patch(rank=1), text_patch(DEMO), tmp_path / "merged.safetensors"
    both = ForgetPatch(DEMO, unet.changes | text.changes, unet.info)
    merge_into_checkpoint(DEMO_FILE, [(both, 1.0)], target)
    before, after = load_file(DEMO_FILE), load_file(target)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    place, _, names = PLACES[DEMO]["text_encoder"]
    assert changed == {key_of(layer) for layer in key_values(DEMO)} | {
        f"{place}.0.{key}" for key, _ in names.values()
    }
