"""The node Import Eraser, through a real server."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmn.hosts.diffusers.load import DEMO_FILE
from fmn.models.families import DEMO, layers, text_layers

from .server import PromptError
from .workflows import demo_loader, drawing, node

KV = [layer for layer in layers(DEMO) if layer.is_key_or_value]
TEXT = text_layers(DEMO)[0]


@pytest.fixture(scope="module")
def files(server):
    """ESD's and AdvUnlearn's kinds of edited weights, and a LECO LoRA."""
    folder, loras = (server.base / "models" / name for name in ("forget_imports", "loras"))
    folder.mkdir(parents=True, exist_ok=True)
    loras.mkdir(parents=True, exist_ok=True)
    base = load_file(DEMO_FILE)
    unet = {
        f"{layer.name}.weight": base[f"model.diffusion_model.{layer.compvis}.weight"].float() * 0.6
        for layer in KV
    }
    torch.save({"unet": unet}, folder / "esd-robot.pt")
    key = f"{TEXT.name.partition('.')[2]}.weight"
    text = base[next(each for each in base if each.endswith(key))].float() * 0.6
    save_file({f"text_encoder.{key}": text}, folder / "advunlearn.safetensors")
    lora = {}
    for layer in KV:
        name = "lora_unet_" + layer.name.replace(".", "_")
        lora[f"{name}.lora_up.weight"] = torch.full((layer.shape[0], 1), 0.3)
        lora[f"{name}.lora_down.weight"] = torch.full((1, layer.shape[1]), 0.3)
    save_file(lora, loras / "leco.safetensors")
    name = "transformer.transformer_blocks.0.attn.add_k_proj"
    flux = {
        f"{name}.lora_B.weight": torch.ones(192, 1),
        f"{name}.lora_A.weight": torch.ones(1, 192),
    }
    save_file(flux, loras / "flux.safetensors")


def importing(file, name="import", **inputs):
    return {
        "concept": node("FMN_Concept", name="robot", kind="object"),
        name: node("FMN_ImportEraser", file=file, concepts=["concept", 0], **inputs),
        f"{name}_text": node("FMN_InspectForgetPatch", patch=[name, 0]),
    }


def test_edited_weights_and_loras_become_patches(server, files):
    base = {"model": ["demo", 0], "clip": ["demo", 1]}
    outputs = server.run(
        demo_loader()
        | importing("forget_imports/esd-robot.pt", "esd", **base)
        | importing("forget_imports/advunlearn.safetensors", "adv", rank=3, **base)
        | importing("loras/leco.safetensors", "leco")
    )
    esd, adv, leco = (outputs[f"{name}_text"]["text"][0] for name in ("esd", "adv", "leco"))
    assert f"layers: {len(KV)}, rank" in esd and "edited weights from esd-robot.pt" in esd
    assert "layers: 1, rank 3" in adv and "LoRA from leco.safetensors" in leco
    assert all("robot (object)" in text for text in (esd, adv, leco))


@pytest.mark.parametrize("file, inputs, message", [
    ("forget_imports/esd-robot.pt", {}, "as the base"),
    ("forget_imports/esd-robot.pt", {"concepts": None}, "perhaps of .robot"),
    ("../../secret.pt", {}, "no file .* to import"),
    ("/etc/passwd", {}, "no file .* to import"),
])  # fmt: skip
def test_refusals(server, files, file, inputs, message):
    prompt = importing(file)
    for name, value in inputs.items():
        prompt["import"]["inputs"].pop(name) if value is None else None
    with pytest.raises(PromptError, match=message):
        server.run(prompt)


def test_the_connected_transformer_says_whose_a_lora_is(server, files):
    graph = demo_loader() | importing("loras/flux.safetensors")
    with pytest.raises(PromptError, match="fits Flux.1 or .*Qwen"):
        server.run(graph)
    graph["demo"]["inputs"]["network"] = "transformer"
    graph["import"]["inputs"]["model"] = ["demo", 0]
    graph["apply"] = node(
        "FMN_ApplyForgetPatch", model=["demo", 0], patch=["import", 0], strength=1.0
    )
    outputs = server.run(graph | drawing(["apply", 0]) | drawing(name="plain"))
    text = outputs["import_text"]["text"][0]
    assert "for: Flux.1, flow prediction" in text and "layers: 1, rank 1" in text
    assert abs(server.image(outputs["image"]) - server.image(outputs["plain"])).mean() > 0.01
