"""What tests of closed forms share: whole matrices, and what a saved file does to them."""

import torch
from safetensors.torch import load_file

from fmn.models.families import layers
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import save_patch

from .tiny import TINY

KEYS_AND_VALUES = [layer for layer in layers(TINY) if layer.is_key_or_value]
WIDTH = TINY.context_dim


def weights(model):
    """Layer name -> W in float64, of all keys and values."""
    return {
        layer.name: model.unet.get_submodule(layer.name).weight.detach().double()
        for layer in KEYS_AND_VALUES
    }


def literal_uce(weight, c, values, kept, erase, preserve, damping):
    """Equation 7 for one W, in sums of outer products; values: v* of each c."""
    left = damping * weight
    right = damping * torch.eye(weight.shape[1], dtype=torch.float64)
    for each, value in zip(c, values):
        left = left + erase * torch.outer(value, each)
        right = right + erase * torch.outer(each, each)
    for each in kept:
        left = left + preserve * torch.outer(weight @ each, each)
        right = right + preserve * torch.outer(each, each)
    return left @ torch.inverse(right)


def assert_solves(patch, model, expected, path, rtol=1e-5):
    """The patch makes these W', and so does its file, as a plain LoRA within fp16 rounding.

    Args:
        expected: layer name -> W'. rtol: the patch keeps float32.
    """
    before = weights(model)
    assert patch.changes.keys() == expected.keys()
    found = load_file(save_patch(patch, path))
    assert sum(key.endswith(".lora_up.weight") for key in found) == len(expected)
    for layer in KEYS_AND_VALUES:
        if layer.name not in expected:
            continue
        change = expected[layer.name] - before[layer.name]
        up, down = (factor.double() for factor in patch.changes[layer.name])
        near(up @ down, change, rtol)
        prefix = file_name(TINY, layer)
        up, down = (found[f"{prefix}.{part}"] for part in ("lora_up.weight", "lora_down.weight"))
        assert up.dtype == down.dtype == torch.float16
        assert float(found.get(f"{prefix}.alpha", len(down))) == len(down)  # a scale of 1
        near(up.double() @ down.double(), change, 5e-3)


def near(found, expected, rtol):
    """The Frobenius norm of the difference is at most rtol of the expected one's."""
    assert float((found - expected).norm()) <= rtol * float(expected.norm())


def rows(count, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, dtype=torch.float64, generator=generator)
