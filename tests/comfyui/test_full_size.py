"""Stable Diffusion 1.5 at its real size (860 M weights, random), through the stock loader."""

import os
import subprocess
import sys

import pytest
from safetensors import safe_open

from .conftest import ROOT, comfyui_path, make_base
from .server import Server
from .workflows import checkpoint_loader, drawing, node, saving, training


@pytest.fixture(scope="module")
def big_server(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("full_size"))
    checkpoint = base / "models" / "checkpoints" / "sd15.safetensors"
    program = ROOT / "benchmarks" / "random_checkpoint.py"
    subprocess.run(
        [sys.executable, program, "sd15", checkpoint],
        env=os.environ | {"COMFYUI_PATH": str(comfyui_path())},
        check=True,
    )
    with Server(comfyui_path(), base, "--disable-metadata") as running:
        yield running
    checkpoint.unlink()


def test_train_save_apply_and_sample(big_server):
    prompt = checkpoint_loader("sd15.safetensors") | training(steps=2, size=256) | saving("sd15")
    prompt["apply"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0
    )
    outputs = big_server.run(prompt | drawing(["apply", 0], steps=2, size=256))
    assert big_server.image(outputs["image"]).shape == (256, 256, 3)

    name = outputs["save"]["text"][0]
    with safe_open(big_server.base / "output" / "forget_patches" / name, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 3 * 32
    assert metadata["fmn.base.family"] == "sd1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"

    # Stock Load LoRA finds a layer for every key.
    prompt = checkpoint_loader("sd15.safetensors") | {
        "lora": node("LoraLoaderModelOnly", model=["demo", 0], lora_name=name, strength_model=1.0)
    }
    big_server.run(prompt | drawing(["lora", 0], steps=1, size=64))
    assert "lora key not loaded" not in big_server.log_text()
