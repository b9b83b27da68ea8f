"""Patches in other programs: every name a file can hold, against the loaders that are at hand.

On models without memory, and for every layer that any method may change. docs/elsewhere.md tells
what follows; that the numbers agree too is tested by test_hosts.py and test_text_patch.py.
"""

import json
import re

import pytest
import torch

from .conftest import ROOT

FAMILIES = ["sd1", "sd2", "sdxl"]
# What diffusers makes of kohya's names, back to the layer's path.
ENDINGS = [
    (re.compile(r"\.processor\.(to_\w+)_lora\.(down|up)\.weight$"), r".\1"),
    (re.compile(r"\.to_(q|k|v|out)_lora\.(down|up)\.weight$"), r".\1_proj"),
    (re.compile(r"\.lora(_linear_layer)?\.(down|up)\.weight$"), ""),
]


@pytest.fixture(params=FAMILIES)
def family(pack, request):
    return pack("fmn.models.families").FAMILIES[request.param]


@pytest.fixture
def layers(pack, family):
    """Layers of the U-Net, and of the text encoders."""
    families = pack("fmn.models.families")
    return families.layers(family), families.text_layers(family)


def file_of(pack, family, layers):
    """The tensors of a patch of rank 1 that changes these layers."""
    changes = {}
    for layer in layers:
        out, *rest = layer.shape
        changes[layer.name] = torch.ones(out, 1, *[1 for _ in rest[1:]]), torch.ones(1, *rest)
    return pack("fmn.patches.patch").ForgetPatch(family, changes, {"concepts": []}).lora()


def test_a_file_holds_kohya_names_and_nothing_else(pack, family, layers):
    """diffusers takes a file for kohya's, and Forge takes it at all, only if all keys are."""
    lora = file_of(pack, family, [*layers[0], *layers[1]])
    names, parts = zip(*(key.split(".", 1) for key in lora))
    encoders = {"lora_te1", "lora_te2"} if family.key == "sdxl" else {"lora_te"}
    assert {re.match("lora_[a-z]+[12]?", name).group() for name in names} == {
        "lora_unet", *encoders
    }  # fmt: skip
    assert set(parts) == {"lora_down.weight", "lora_up.weight"}
    assert len(lora) == 2 * len(set(names)) == 2 * (len(layers[0]) + len(layers[1]))
    blocks = {re.match("lora_unet_(input|output|down|up)_blocks", name) for name in names} - {None}
    paths = {"input", "output"} if family.key == "sdxl" else {"down", "up"}
    assert {block.group(1) for block in blocks} == paths


# ComfyUI tells 2.x from 1.x by the text's width alone; its names are those of 1.x.
@pytest.mark.parametrize("family", ["sd1", "sdxl"], indirect=True)
def test_comfyui_knows_every_unet_name(pack, monkeypatch, family, layers):
    import comfy.lora
    import comfy.supported_models

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import random_checkpoint

    kind, unet = {
        "sd1": (comfy.supported_models.SD15, "sd15"),
        "sdxl": (comfy.supported_models.SDXL, "sdxl"),
    }[family.key]
    config = kind(random_checkpoint.COMMON | random_checkpoint.UNETS[unet])
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, "", device=torch.device("meta"))
    names = comfy.lora.model_lora_keys_unet(model, {})
    assert len(comfy.lora.load_lora(file_of(pack, family, layers[0]), names)) == len(layers[0])


def test_comfyui_knows_every_text_name(pack, family, layers):
    import comfy.lora
    from comfy.sd1_clip import SD1ClipModel
    from comfy.sdxl_clip import SDXLClipModel
    from comfy.text_encoders.sd2_clip import SD2ClipModel

    kind = {"sd1": SD1ClipModel, "sd2": SD2ClipModel, "sdxl": SDXLClipModel}[family.key]
    names = comfy.lora.model_lora_keys_clip(kind(device="meta"), {})
    lora = file_of(pack, family, layers[1])
    text = {key: lora[key] for key in lora if key.startswith("lora_te")}
    assert len(comfy.lora.load_lora(text, names)) == len(layers[1])


def test_diffusers_knows_every_name(pack, family, layers):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    configs = json.loads((ROOT / "fmn" / "assets" / "pipelines.json").read_text())[family.key]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet/config.json"])
    lora = file_of(pack, family, [*layers[0], *layers[1]])
    if family.key == "sdxl":  # the Stability names are told apart by the U-Net's blocks
        found, _ = StableDiffusionXLPipeline.lora_state_dict(lora, unet_config=unet.config)
    else:
        found, _ = StableDiffusionPipeline.lora_state_dict(lora)
    paths = set()
    for key in found:
        for ending, path in ENDINGS:
            key = ending.sub(path, key)
        paths.add(key)
    inside = {f"unet.{name}" for name, _ in unet.named_modules()}
    assert {path for path in paths if path.startswith("unet.")} <= inside
    texts = {path for path in paths if path.startswith("text_encoder")}
    assert texts == {layer.name for layer in layers[1]}
    assert len(paths) == len(layers[0]) + len(layers[1])
