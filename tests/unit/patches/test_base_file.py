"""A checkpoint file's family and fingerprint, without loading the model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.errors import ForgetError
from fmn.models.families import DEMO, FAMILIES, layers
from fmn.models.interface import fingerprint
from fmn.patches.checkpoint import base_of
from fmn.patches.weight_names import UNET_PREFIX

from .test_checkpoint import DEMO_FILE


def key_values(family):
    return [layer for layer in layers(family) if layer.is_key_or_value]


def test_the_demo_checkpoint():
    """The fingerprint is the one its patches hold; docs/patch-format.md shows it."""
    assert base_of(DEMO_FILE) == ("demo", "31a36f84a352c2c121951bd00dad75e7")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("naming", ["checkpoint", "diffusion model", "diffusers"])
def test_it_is_the_fingerprint_of_the_weights(tmp_path, dtype, naming):
    generator = torch.Generator().manual_seed(1)
    weights = {
        layer.name: torch.randn(layer.shape, generator=generator).to(dtype)
        for layer in key_values(DEMO)
    }
    names = {
        "checkpoint": lambda layer: UNET_PREFIX + layer.compvis,
        "diffusion model": lambda layer: layer.compvis,
        "diffusers": lambda layer: layer.name,
    }
    tensors = {f"{names[naming](layer)}.weight": weights[layer.name] for layer in key_values(DEMO)}
    save_file(tensors, tmp_path / "base.safetensors")
    expected = fingerprint(DEMO, lambda layer: weights[layer.name])
    assert base_of(tmp_path / "base.safetensors") == ("demo", expected)


@pytest.mark.parametrize("key", ["sd1", "sd2"])
def test_full_size_families(tmp_path, key):
    layers_of = key_values(FAMILIES[key])
    tensors = {
        f"{UNET_PREFIX}{layer.compvis}.weight": torch.zeros(layer.shape, dtype=torch.float16)
        for layer in layers_of
    }
    save_file(tensors, tmp_path / "base.safetensors")
    assert base_of(tmp_path / "base.safetensors")[0] == key


def test_another_model(tmp_path):
    save_file({"double_blocks.0.txt_attn.qkv.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert base_of(tmp_path / "a.safetensors") == ("other", "")


def test_one_changed_weight_is_another_base(tmp_path):
    tensors = load_file(DEMO_FILE)
    key = f"{UNET_PREFIX}{key_values(DEMO)[-1].compvis}.weight"
    tensors[key][0, 0] += 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    family, found = base_of(tmp_path / "tuned.safetensors")
    assert family == "demo" and found != base_of(DEMO_FILE)[1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(99), b"\xff" * 40])
def test_damaged(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ForgetError, match="damaged or not a safetensors file"):
        base_of(tmp_path / "bad.safetensors")
