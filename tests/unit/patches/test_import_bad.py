"""Files that are no eraser, or no whole one, named for what they are."""

import pickle
import sys
import warnings

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.patches.import_patch import import_patch

from .erasers import KV, demo_weights, factors, kohya, write

DOG = [Concept("dog")]


class Evil:
    def __reduce__(self):
        return print, ("run",)


def bad(name, content):
    def make(folder):
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    return make


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FLUX = {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(4, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4)}  # fmt: skip
INT8 = {key: one.to(torch.int8) for key, one in kohya(KV[0], *factors(KV[0])).items()}
BAD = {
    "LFS pointer": (bad("a.safetensors", LFS), "Git LFS pointer.*git lfs pull"),
    "LFS pointer as .pt": (bad("a.pt", LFS), "Git LFS pointer"),
    "web page": (bad("a.safetensors", b"<!DOCTYPE html><html>"), "web page"),
    "web page with space": (bad("a.ckpt", b"\n\n <HTML lang=en>"), "web page"),
    "empty": (bad("a.pt", b""), "empty"),
    "noise": (bad("a.bin", bytes(range(1, 200))), "not begin like one"),
    "cut zip": (bad("a.pt", b"PK\x03\x04" + bytes(90)), "damaged"),
    "a pickle that runs code": (bad("a.pt", {"unet": Evil()}), "holds more than tensors"),
    "CASteer's vectors": (bad("a.pickle", pickle.dumps({0: {"up": [1.0]}})), "raw Python pickle"),
    "raw pickle, protocol 5": (bad("a.pt", pickle.dumps({"a": 1}, 5)), "raw Python pickle"),
    "numbers that are not there": (bad("a.pt", {"a": torch.ones(1).expand(9, 9)}), "claims .9, 9"),
    "sparse": (bad("a.pt", {"a": torch.eye(3).to_sparse()}), "holds more than tensors"),
    "an older ESD": (bad("a.pt", {"ft_modules_list.0.weight": torch.ones(2, 2)}), "numbers layers"),
    "embedding of concept ablation": (
        bad("a.ckpt", {"state_dict": {"embed": torch.ones(2, 2)}}),
        "embedding",
    ),
    "whole numbers": (bad("a.pt", INT8), "no floating point"),
    "a tensor alone": (bad("a.pt", torch.ones(3)), "not layers by name"),
    "a list of vectors": (bad("a.pt", [torch.ones(3)]), "not layers by name"),
    "settings": (bad("a.pt", {"steps": 3}), "no tensors"),
    "LoHa": (bad("a.pt", {"lora_unet_a.hada_w1_a": torch.ones(2, 2)}), "LoHa"),
    "LoKr": (bad("a.pt", {"lora_unet_a.lokr_w1": torch.ones(2, 2)}), "LoKr"),
    "DoRA": (bad("a.pt", {"unet.a.dora_scale": torch.ones(2, 2)}), "DoRA"),
    "Flux LoRA": (bad("a.pt", FLUX), "fits Flux.1 or Flux.2 or Chroma: say"),
    "VAE": (bad("a.pt", {"first_stage_model.encoder.conv_in.weight": torch.ones(2)}), "is a VAE"),
    "embedding": (bad("a.pt", {"emb_params": torch.ones(2, 4)}), "embedding"),
    "ControlNet": (bad("a.pt", {"control_model.input.weight": torch.ones(2)}), "is a ControlNet"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_what_cannot_be_imported_is_named(tmp_path, make, message):
    with pytest.raises(ForgetError, match=message) as caught:
        import_patch(make(tmp_path), DOG)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("change, message", [
    (lambda weight: weight * torch.nan, "NaN or infinite"),
    (lambda weight: weight.to(torch.int8), "as int8"),
])  # fmt: skip
def test_weights_that_are_no_numbers_to_use(tmp_path, change, message):
    weights = demo_weights()
    weights[f"{KV[0].name}.weight"] = change(weights[f"{KV[0].name}.weight"])
    file = write(tmp_path / "a.safetensors", weights)
    with pytest.raises(ForgetError, match=message):
        import_patch(file, DOG, base="../demo/fmn-demo.safetensors")


def test_a_few_hundred_damaged_files(tmp_path):
    """``benchmarks/mutated_files.py`` with a small count."""
    sys.path.insert(0, "../benchmarks")
    from mutated_files import run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results, slowest, wrong = run(0, 300, tmp_path)
    assert wrong == [] and slowest[0] < 5
    assert sum(results.values()) == 300 and results["imported", "refused"] > 50
