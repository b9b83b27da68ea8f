import json
import os
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fmn
from fmn.checkpoint import UNET_PREFIX, checkpoint_family, merge_into_checkpoint
from fmn.errors import ForgetError
from fmn.families import DEMO, SD1, SD2, SDXL, layers
from fmn.patch import ForgetPatch

from .tiny import make_patch, metadata_of, same_tensors

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
    assert checkpoint_family(DEMO_FILE) is DEMO


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=lambda family: family.key)
def test_family_by_shapes(tmp_path, family):
    header, end = {}, 0
    for layer in key_values(family):
        start, end = end, end + prod(layer.shape)
        header[key_of(layer)] = {"dtype": "U8", "shape": layer.shape, "data_offsets": [start, end]}
    text, path = json.dumps(header).encode(), tmp_path / "checkpoint.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)  # a hole: no space is taken
    assert checkpoint_family(path) is family


def test_unknown_checkpoint(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.a.attn2.to_k.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ForgetError, match="'other.safetensors' is no checkpoint .* it has 1 cross"):
        checkpoint_family(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(100)])
def test_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ForgetError, match="damaged.safetensors' is damaged or not a safetensors"):
        checkpoint_family(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(ForgetError, match="none.safetensors"):
        checkpoint_family(tmp_path / "none.safetensors")


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
    assert checkpoint_family(target) is DEMO


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
