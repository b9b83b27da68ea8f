"""Other tools' LoRAs for transformers: whose they are, joined matrices, and what is refused.

``tests/comfyui/test_transformer_import.py`` compares all names with ComfyUI's.
"""

import json

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.models.transformer_layers import LAYERS, Place, place_of
from fmn.models.transformers import BY_KEY
from fmn.patches.import_patch import import_patch
from fmn.patches.patch import load_patch, save_patch

from .erasers import write

DOG = [Concept("dog")]
DOUBLE, SINGLE = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.0."


def lora(*names, rows=6, columns=4, rank=2):
    tensors = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def read(tmp_path, tensors, family=None, metadata=None):
    file = write(tmp_path / "lora.safetensors", tensors, metadata)
    return import_patch(file, DOG, family=family).patch


def product(tensors, name):
    return tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]


@pytest.mark.parametrize("entry", BY_KEY.values(), ids=BY_KEY)
def test_what_text_reaches_is_in_the_table_by_both_names(entry):
    for reader in (*entry.readers, *entry.text):
        paths = [path.format(7) for path in (reader.comfy, reader.diffusers)]
        for name in (paths[0].replace(".", "_"), *paths):
            assert place_of(entry, name) == Place(paths[0])
    assert LAYERS.keys() == BY_KEY.keys()


@pytest.mark.parametrize("name, key", [
    ("lora_unet_layers_3_adaLN_modulation_0", "z_image"),
    ("lora_unet_layers_3_adaLN_modulation_1", "lumina2"),
    ("base_model.model.layers.3.attention.to_out", "z_image"),
    ("lora_unet__blocks_0_cross_attn_o", "wan"),
    ("diffusion_model.blocks.0.cross_attn.output_proj", "anima"),
    ("lora_unet_single_blocks_0_modulation_lin", "flux"),
    ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "sd3"),
    ("transformer_blocks.0.img_mod.1", "qwen_image"),
])  # fmt: skip
def test_the_names_tell_the_model(tmp_path, name, key):
    assert read(tmp_path, lora(name)).family.entry.key == key


def test_the_metadata_tell_it_where_names_do_not(tmp_path):
    tensors, metadata = lora(f"{DOUBLE}attn.add_k_proj"), {"modelspec.architecture": "chroma/lora"}
    with pytest.raises(ForgetError, match="fits Flux.1 or .* or Stable Diffusion 3: say .*family"):
        read(tmp_path, tensors)
    assert read(tmp_path, tensors, metadata=metadata).family.entry.key == "chroma"
    assert read(tmp_path, tensors, "qwen_image", metadata).family.model == "QwenImage"


def test_some_parts_of_a_joined_matrix(tmp_path):
    """EraseAnything's two layers; a single block without its feed-forward part."""
    names = f"{DOUBLE}attn.add_q_proj", f"{DOUBLE}attn.add_k_proj", f"{SINGLE}attn.to_v"
    tensors = lora(*names)
    patch = save_patch(read(tmp_path, tensors, "flux"), tmp_path / "patch.safetensors")
    patch = load_patch(patch)
    joined = patch.change_of("lora_unet_double_blocks_0_txt_attn_qkv")
    expected = torch.cat([*(product(tensors, name) for name in names[:2]), torch.zeros(6, 4)])
    torch.testing.assert_close(joined, expected, rtol=1e-2, atol=1e-2)
    joined = patch.change_of("lora_unet_single_blocks_0_linear1")
    assert joined.shape == (7 * 6, 4) and patch.ranks == [2, 4]
    torch.testing.assert_close(joined[12:18], product(tensors, names[2]), rtol=1e-2, atol=1e-2)
    assert not joined[:12].any() and not joined[18:].any()


def test_pefts_alpha_in_the_header(tmp_path):
    tensors = lora(name := f"{SINGLE}proj_out")
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})
    patch = read(tmp_path, tensors, "flux", {"lora_adapter_metadata": config})
    found = patch.change_of("lora_unet_single_blocks_0_linear2")
    torch.testing.assert_close(found, 4 * product(tensors, name))


OUT = f"{DOUBLE}attn.to_out.0"
BAD = {
    "text encoder": (lora(OUT, "lora_te1_text_model_encoder_layers_0_mlp_fc1"), "'lora_te1_text"),
    "norm": (lora(OUT) | {f"{DOUBLE}norm.w_norm": torch.ones(4)}, "'.*w_norm', which is no layer"),
    "bias": (lora(OUT) | {f"{OUT}.diff_b": torch.ones(6)}, "holds '.*diff_b'"),
    "swapped halves": (lora(OUT, "transformer.norm_out.linear"), "'transformer.norm_out.linear'"),
    "another model": (lora("lora_unet_foo"), "'lora_unet_foo'"),
    "two names": (lora(OUT, "lora_unet_double_blocks_0_img_attn_proj"), "changes '.*' twice"),
    "part and whole": (
        lora(f"{DOUBLE}attn.to_q", "lora_unet_double_blocks_0_img_attn_qkv"), "twice",
    ),
    "parts of other sizes": (
        lora(f"{DOUBLE}attn.to_q") | lora(f"{DOUBLE}attn.to_k", rows=5), "do not fit together",
    ),
    "high rank": (lora(*(f"{DOUBLE}attn.to_{x}" for x in "qkv"), rank=400), "rank 1200"),
    "half": ({f"{OUT}.lora_A.weight": torch.ones(1, 4)}, f"two factors .*'{OUT}'"),
    "a vector": ({f"{OUT}.diff": torch.ones(4)}, "two factors"),
    "huge": (
        {f"{OUT}.lora_A.weight": torch.ones(1, 1 << 16),
         f"{OUT}.lora_B.weight": torch.ones(1 << 15, 1)}, "two factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tensors, message", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused(tmp_path, tensors, message):
    with pytest.raises(ForgetError, match=message) as caught:
        read(tmp_path, tensors, "flux")
    assert len(str(caught.value)) < 300


def test_the_closest_model_is_named_if_none_has_all_layers(tmp_path):
    tensors = lora("lora_unet_single_blocks_0_modulation_lin", "lora_unet_foo")
    with pytest.raises(ForgetError, match="'lora_unet_foo', which is no layer of Flux.1"):
        read(tmp_path, tensors)
    with pytest.raises(ForgetError, match="not those of any model that we know"):
        read(tmp_path, lora("lora_unet_foo"))
    with pytest.raises(ForgetError, match="not those of Stable Diffusion 1.x"):
        read(tmp_path, lora(OUT), "sd1")
