"""What is given in place of what was asked for, by the names in it."""

import pytest
import torch
from safetensors.torch import save_file

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.patches.checkpoint import checkpoint_family
from fmn.patches.file_kind import kind_of
from fmn.patches.foreign_file import read_foreign
from fmn.patches.import_patch import import_patch
from fmn.patches.patch import load_patch

UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
KINDS = {
    "an ESD file that numbers layers instead of naming them": ["ft_modules_list.0.weight"],
    "a LoRA": [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
    ],
    "a VAE": [
        "first_stage_model.decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight", "encoder.layers.0.weight",
    ],
    "a textual inversion embedding": [
        "emb_params", "<my-dog>", "clip_l", "string_to_param.*", "embed",
    ],
    "a ControlNet": [
        "control_model.input_hint_block.0.weight", "input_hint_block.0.weight",
        "controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight",
    ],
    "a diffusion transformer": [
        "double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.joint_blocks.0.x.weight",
        "transformer_blocks.0.attn.add_k_proj.weight", "single_transformer_blocks.0.norm.weight",
        "layers.0.attention.qkv.weight", "context_refiner.0.attention.out.weight",
    ],
    "a text encoder": [
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight", "transformer.resblocks.0.ln_1.weight",
    ],
    "a U-Net": [
        UNET, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    ],
    "an image encoder": ["vision_model.encoder.layers.0.self.weight", "visual.conv1.weight"],
    "an IP-Adapter": ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"],
    "an upscaler": ["body.0.rdb1.conv1.weight", "model.1.sub.0.RDB1.conv1.0.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_any_of_its_names(kind):
    assert [kind_of([key]) for key in KINDS[kind]] == [kind] * len(KINDS[kind])


def test_a_whole_checkpoint_is_no_part_of_it():
    parts = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", UNET
    assert kind_of(parts) == "a whole checkpoint"
    assert kind_of(["first_stage_model.decoder.conv_in.weight", UNET]) == "a whole checkpoint"
    assert kind_of(["weight", "0.bias"]) is None and kind_of([]) is None


READERS = {
    "as a model": lambda path: checkpoint_family(read_foreign(path)),
    "as a patch": load_patch,
    "to import": lambda path: import_patch(path, [Concept("dog")]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("a LoRA", "a U-Net")])
def test_it_is_named_whatever_it_is_given_as(tmp_path, kind, reader):
    save_file({KINDS[kind][0]: torch.zeros(2, 2)}, tmp_path / "given.safetensors")
    with pytest.raises(ForgetError, match=f"'given.safetensors' is .*{kind}") as caught:
        READERS[reader](tmp_path / "given.safetensors")
    assert len(str(caught.value)) < 300


def test_a_lora_is_named_as_a_model_and_as_a_patch(tmp_path):
    save_file({KINDS["a LoRA"][0]: torch.zeros(2, 2)}, tmp_path / "given.safetensors")
    with pytest.raises(ForgetError, match="is a LoRA, not a supported checkpoint"):
        checkpoint_family(read_foreign(tmp_path / "given.safetensors"))
    with pytest.raises(ForgetError, match="not a forget patch but a LoRA.*Use Load LoRA"):
        load_patch(tmp_path / "given.safetensors")


def test_a_unet_of_other_layers_is_an_unsupported_model(tmp_path):
    save_file({UNET: torch.zeros(2, 2)}, tmp_path / "vega.safetensors")
    with pytest.raises(ForgetError, match="is a model of an unsupported family.*method ESD"):
        checkpoint_family(read_foreign(tmp_path / "vega.safetensors"))
