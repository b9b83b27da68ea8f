"""Stable Diffusion 1.5 and 2.1 (v prediction) at their real size, with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from .conftest import ROOT, comfyui_path, make_base
from .server import Server
from .workflows import checkpoint_loader, drawing, node, saving, training


@pytest.fixture(scope="module")
def big_server(tmp_path_factory):
    base = make_base(tmp_path_factory.mktemp("full_size"))
    checkpoint = make_checkpoint(base, "sd15")
    with Server(comfyui_path(), base, "--disable-metadata") as running:
        yield running
    checkpoint.unlink()


def make_checkpoint(base, name):
    """A checkpoint of random weights where the server finds it."""
    path = base / "models" / "checkpoints" / f"{name}.safetensors"
    program = ROOT / "benchmarks" / "random_checkpoint.py"
    subprocess.run(
        [sys.executable, program, name, path],
        env=os.environ | {"COMFYUI_PATH": str(comfyui_path())},
        check=True,
    )
    return path


def resident(process, field):
    """VmRSS or VmHWM (its peak) of a process, in bytes."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_peak_memory_at_256_pixels(big_server):
    """Keys and values, float32, batch 1: at most 0.8 GB beyond the loaded weights.

    The first test of its server, which has drawn one small picture and nothing else.
    """
    load = checkpoint_loader("sd15.safetensors")
    big_server.run(load | drawing(steps=1, size=64, seed=2))
    loaded = resident(big_server.process, "VmRSS")
    Path(f"/proc/{big_server.process.pid}/clear_refs").write_text("5")
    big_server.run(load | training(steps=1, size=256) | saving("peak"))
    beyond = resident(big_server.process, "VmHWM") - loaded
    print(f"peak memory beyond the loaded weights: {beyond / 1e9:.2f} GB")
    assert beyond < 0.8e9


BY_HAND = pytest.mark.skipif("FULL_SIZE" not in os.environ, reason="by hand, with FULL_SIZE=1")
FULL = [
    ("sd15", "sd1", "epsilon", "stable-diffusion-v1"),
    pytest.param(("sd21", "sd2", "v", "stable-diffusion-v2-768-v"), marks=BY_HAND),
]


@pytest.fixture(scope="module", params=FULL, ids=["sd15", "sd21"])
def model(big_server, request):
    """A checkpoint; its family, prediction and architecture."""
    name, *rest = request.param
    path = big_server.base / "models" / "checkpoints" / f"{name}.safetensors"
    if name != "sd15":
        make_checkpoint(big_server.base, name)
    yield path, *rest
    if name != "sd15":
        path.unlink()


@pytest.fixture(scope="module")
def ours(big_server, model):
    """What the server saves and draws when it trains on it, and the patch's path."""
    prompt = checkpoint_loader(model[0].name) | training(steps=2, size=64) | saving("ours")
    prompt["apply"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0
    )
    outputs = big_server.run(prompt | drawing(["apply", 0], steps=2, size=64))
    name = outputs["save"]["text"][0]
    return outputs, big_server.base / "output" / "forget_patches" / name


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """What the command line says of a training on it."""
    settings = "--steps", "2", "--size", "64", "--lr", "0.002", "--references", "zeros"
    out = tmp_path_factory.mktemp("theirs") / "dog.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "fmn", "forget", model[0], "dog", "--method", "resteer", *settings,
         "--json", "--out", out],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["info"]


# Four tests, so that each has two minutes.
def test_a_checkpoint_has_its_real_size(model):
    assert 2.1e9 < model[0].stat().st_size < 2.7e9


def test_the_command_line_trains_on_it(model, theirs):
    """diffusers from the single file."""
    assert theirs["base.prediction"] == model[2] and theirs["loss"]["steps"] == 2


def test_train_save_apply_and_sample(big_server, model, ours):
    outputs, path = ours
    assert big_server.image(outputs["image"]).shape == (64, 64, 3)
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 2 * 32
    assert metadata["fmn.base.family"] == model[1]
    assert metadata["modelspec.architecture"] == f"{model[3]}/lora"

    # Stock Load LoRA finds a layer for every key.
    prompt = checkpoint_loader(model[0].name) | {
        "lora": node(
            "LoraLoaderModelOnly", model=["demo", 0], lora_name=path.name, strength_model=1.0
        )
    }
    big_server.run(prompt | drawing(["lora", 0], steps=1, size=64))
    assert "lora key not loaded" not in big_server.log_text()


def test_both_train_on_the_same_file_alike(model, ours, theirs):
    """The same base, prediction and losses."""
    with safe_open(ours[1], "pt") as file:
        keys = "loss", "base.fingerprint", "base.prediction"
        ours = {key: json.loads(file.metadata()[f"fmn.{key}"]) for key in keys}
    assert ours["base.prediction"] == model[2]
    assert ours["base.fingerprint"] == theirs["base.fingerprint"]
    assert ours["loss"]["first"] == pytest.approx(theirs["loss"]["first"], rel=1e-3)
    assert ours["loss"]["last"] == pytest.approx(theirs["loss"]["last"], rel=1e-3)
