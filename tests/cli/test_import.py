"""``python -m fmn import`` on files as other tools write them."""

import json

import torch
from safetensors.torch import load_file, save_file

from fmn.cli.main import BAD_INPUT, OK, main
from fmn.hosts.diffusers.load import DEMO_FILE
from fmn.models.families import DEMO, layers
from fmn.patches.patch import load_patch

KV = [layer for layer in layers(DEMO) if layer.is_key_or_value]


def edited(path, change=0.02):
    base = load_file(DEMO_FILE)
    weights = {}
    for layer in KV:
        weight = base[f"model.diffusion_model.{layer.compvis}.weight"].float()
        weights[f"{layer.name}.weight"] = weight + change * torch.ones(layer.shape)
    torch.save({"unet": weights}, path)
    return path


def test_edited_weights_become_a_patch(tmp_path, capsys):
    file, out = edited(tmp_path / "esd-dog.pt"), tmp_path / "dog.safetensors"
    arguments = ["import", str(file), "--base", "demo", "--concept", "style:ink", "--out", str(out)]
    assert main(arguments) == OK
    text = capsys.readouterr().out
    assert "read as: edited weights" in text and "imported: edited weights from esd-dog.pt" in text
    patch = load_patch(out)
    assert patch.ranks == [1] and patch.info["concepts"][0]["kind"] == "style"
    assert main(["inspect", str(out), "--json"]) == OK
    record = json.loads(capsys.readouterr().out)["info"]["imported"]
    assert record["file"] == "esd-dog.pt"


def test_a_lora_of_a_transformer(tmp_path, capsys):
    file, out = tmp_path / "lora.safetensors", tmp_path / "dog.safetensors"
    shapes = {"lora_down.weight": (1, 192), "lora_up.weight": (192, 1), "alpha": ()}
    tensors = {part: torch.ones(shape) for part, shape in shapes.items()}
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.{part}": tensor for part, tensor in tensors.items()}, file)
    arguments = ["import", str(file), "--concept", "dog", "--out", str(out)]
    assert main(arguments) == BAD_INPUT
    assert "fits Flux.1 or Flux.2 or Chroma: say which with --family" in capsys.readouterr().err
    assert main([*arguments, "--family", "flux"]) == OK
    assert "for: Flux.1, flow prediction" in capsys.readouterr().out
    key = "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight"
    assert key in load_file(out)


def test_refusals(tmp_path, capsys):
    file = edited(tmp_path / "esd-dog.pt")
    (tmp_path / "x").mkdir()
    for arguments, words in (
        ([str(file)], '(--concept), perhaps "dog"'),
        ([str(file), "--concept", "dog"], "--base"),
        ([str(file), "--concept", "dog", "--rank", "-1"], "--rank is -1"),
        ([str(tmp_path / "none.pt"), "--concept", "dog"], "cannot be read"),
        ([str(tmp_path / "x"), "--concept", "dog"], "no weights"),
        ([str(file), "--concept", "dog", "--base", "demo", "--out", "x.pt"], "safetensors"),
    ):
        assert main(["import", *arguments]) == BAD_INPUT
        assert words in capsys.readouterr().err
