"""The diffusers host beside the command line: schedulers, folders, shapes."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fmn
from fmn.errors import ForgetError
from fmn.hosts.diffusers.load import DEMO_FILE
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.models.families import DEMO
from fmn.patches.patch import ForgetPatch


@pytest.fixture
def model():
    return DiffusersModel.load("demo")


SCHEDULERS = [
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_have_unit_variance_with_any_scheduler(model, name):
    pipeline = model.pipeline
    pipeline.scheduler = getattr(diffusers, name).from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    latents = model.sample_latents(["a photo of a dog"], model.initial_noise([0], 128), 6, 3.5)
    assert 0.5 < latents.std() < 2


@pytest.mark.parametrize("shard", ["10GB", "2MB"])
def test_a_folder_of_half_precision_copies(model, tmp_path, shard):
    """As many are published; where there is a plain copy too, that one is read."""
    halves = copy.deepcopy(model.pipeline).to(torch.float16)
    halves.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size=shard)
    assert not list((tmp_path / "base").rglob("*model.safetensors"))
    weight, found = model.unet.conv_in.weight, DiffusersModel.load(tmp_path / "base")
    assert found.unet.dtype == found.pipeline.text_encoder.dtype == torch.float32
    assert torch.equal(found.unet.conv_in.weight, weight.half().float())
    model.pipeline.save_pretrained(tmp_path / "base")
    assert torch.equal(DiffusersModel.load(tmp_path / "base").unet.conv_in.weight, weight)


@pytest.mark.parametrize(
    ("cut", "told"),
    [
        ("cond_stage_model.", "'unet.safetensors' lacks the text encoder: use a whole checkpoint"),
        (
            "cond_stage_model.transformer.text_model.final",
            "lacks 2 of the text encoder's 52 weights, such as "
            "'cond_stage_model.transformer.text_model.final_layer_norm.weight': get it again",
        ),
        ("first_stage_model.vae_scale", "lacks the VAE's weight 'vae_scale'"),
    ],
)
def test_checkpoints_without_all_parts_are_refused(tmp_path, cut, told):
    """ComfyUI's ModelSave writes the U-Net alone."""
    weights = {key: w for key, w in load_file(DEMO_FILE).items() if not key.startswith(cut)}
    save_file(weights, tmp_path / "unet.safetensors")
    with pytest.raises(ForgetError, match=told):
        DiffusersModel.load(tmp_path / "unet.safetensors")


def test_want_of_memory_is_no_damaged_checkpoint(monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("fmn.hosts.diffusers.load._single_file", load)
    with pytest.raises(torch.OutOfMemoryError):
        DiffusersModel.load(DEMO_FILE)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
PLACES = {
    "model_index.json": LFS, "unet/config.json": b"<!DOCTYPE html><html>",
    "tokenizer/tokenizer.json": LFS, "scheduler/scheduler_config.json": b"Entry not found",
    "unet/diffusion_pytorch_model.safetensors": LFS, "vae/diffusion_pytorch_model.safetensors": b"",
    "text_encoder/model.safetensors": b'{"error":"Unauthorized"}',
}  # fmt: skip


def test_failed_downloads_in_a_folder_are_named(model, tmp_path):
    """In every place; and a file that ends early."""
    model.save(tmp_path / "base [1]")
    for place, content in PLACES.items():
        path = tmp_path / "base [1]" / place
        whole = path.read_bytes()
        for spoiled in (content, whole[: len(whole) // 2]) if "safe" in place else (content,):
            path.write_bytes(spoiled)
            with pytest.raises(ForgetError, match=f"^'{path.name}' is ") as caught:
                DiffusersModel.load(tmp_path / "base [1]")
            assert "claims" not in str(caught.value) and len(str(caught.value)) < 300
        path.write_bytes(whole)
    DiffusersModel.load(tmp_path / "base [1]")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.ckpt", None, "not a supported checkpoint"),
        ("a.safetensors", LFS, "Git LFS pointer"),
        ("a.SAFETENSORS", LFS, "Git LFS pointer"), ("a.ckpt", LFS, "Git LFS pointer"),
        ("a.ckpt", b"PK\x03\x04", "cut short or damaged"), ("none.ckpt", b"", "There is no model"),
    ],
)  # fmt: skip
def test_single_files_that_are_no_model(tmp_path, name, content, message):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.ckpt")
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ForgetError, match=message):
        DiffusersModel.load(tmp_path / name)


def test_an_ending_in_capitals(model, tmp_path):
    shutil.copy(DEMO_FILE, tmp_path / "DEMO.SAFETENSORS")
    assert DiffusersModel.load(tmp_path / "DEMO.SAFETENSORS").fingerprint() == model.fingerprint()


def test_a_folder_loads_in_a_locale_without_utf8(model, tmp_path):
    model.save(tmp_path / "base")
    config = tmp_path / "base" / "unet" / "config.json"
    content = json.loads(config.read_text("utf-8")) | {"_name_or_path": "modèle"}
    config.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    code = (
        "import locale, sys; from fmn.hosts.diffusers.model import DiffusersModel; "
        "assert 'UTF' not in locale.getpreferredencoding().upper(); "
        "DiffusersModel.load(sys.argv[1])"
    )
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base")],
        cwd=Path(fmn.__file__).parents[1], env=os.environ | ascii_locale, check=True, timeout=120,
    )  # fmt: skip


def test_patches_are_added_all_or_none(model):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    good = ForgetPatch(DEMO, {name: (torch.ones(192, 1), torch.ones(1, 128))})
    conv = model.unet.conv_in
    model.unet.conv_in = torch.nn.Conv2d(5, conv.out_channels, 3, padding=1)
    bad = ForgetPatch(DEMO, {"conv_in": (torch.ones(64, 1, 1, 1), torch.ones(1, 4, 3, 3))})
    before = model.unet.get_submodule(name).weight.clone()
    with pytest.raises(ForgetError, match="variant"):
        model.add_patches([(good, 1.0), (bad, 1.0)])
    assert torch.equal(model.unet.get_submodule(name).weight, before)


def test_a_failed_folder_leaves_nothing_but_what_was_there(model, tmp_path, monkeypatch):
    def fail(folder):
        folder.mkdir()
        (folder / "half").write_text("written")
        raise SafetensorError("disk full")

    own = tmp_path / "merged.part" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("mine")
    monkeypatch.setattr(model.pipeline, "save_pretrained", fail)
    with pytest.raises(ForgetError, match="could not be written .disk full."):
        model.save(tmp_path / "merged")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]
    monkeypatch.setattr(model.pipeline, "save_pretrained", lambda folder: folder.mkdir())
    model.save(tmp_path / "merged")
    assert own.read_text() == "mine" and list((tmp_path / "merged").iterdir()) == []


def test_a_variant_with_another_input_layer_is_refused(model):
    """A U-Net that reads depth: it takes a K/V patch, but no training and no whole-U-Net patch."""
    conv = model.unet.conv_in
    model.unet.conv_in = torch.nn.Conv2d(5, conv.out_channels, 3, padding=1)
    model.unet.register_to_config(in_channels=5)
    patch = ForgetPatch(DEMO, {"conv_in": (torch.ones(64, 1, 1, 1), torch.ones(1, 4, 3, 3))})
    with pytest.raises(ForgetError, match=r"\[64, 4, 3, 3\], the model has \[64, 5, 3, 3\]"):
        model.add_patches([(patch, 1.0)])
    with pytest.raises(ForgetError, match="reads 5 channels"), model.borrow_denoiser():
        pass
    keys = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    before = model.unet.get_submodule(keys).weight.clone()
    model.add_patches([(ForgetPatch(DEMO, {keys: (torch.ones(192, 1), torch.ones(1, 128))}), 0.5)])
    assert torch.allclose(model.unet.get_submodule(keys).weight, before + 0.5)
