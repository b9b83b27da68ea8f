"""A VAE put together from a file's tensors."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from fmn.errors import ForgetError
from fmn.hosts.diffusers.parts import make_vae
from fmn.patches.foreign_file import read_foreign


def test_a_vae_of_older_names(tmp_path):
    config = {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = AutoencoderKL.from_config(config)
    tensors = vae.state_dict()
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): weight for key, weight in tensors.items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    made = make_vae(read_foreign(tmp_path / "vae.safetensors"), config, torch.float32)
    pairs = zip(made.parameters(), vae.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ForgetError, match="lacks 1 of the VAE's .*'decoder.conv_in.weight'"):
        make_vae(read_foreign(tmp_path / "vae.safetensors"), config, torch.float32)
