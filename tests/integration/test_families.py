import json
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import fmn
from fmn.models.families import (
    DEMO,
    FAMILIES,
    SD1,
    SD2,
    SDXL,
    cross_attention_names,
    identify,
    layers,
    layers_by_name,
    text_layers,
)
from fmn.patches.lora_keys import file_name, known_names
from tests.unit.tiny import TINY, tiny_unet

PACKAGE = Path(fmn.__file__).parent
DEMO_FILE = PACKAGE.parent / "demo" / "fmn-demo.safetensors"
PIPELINES = json.loads((PACKAGE / "assets" / "pipelines.json").read_text())
UNET_CONFIGS = {key: config["unet/config.json"] for key, config in PIPELINES.items()}
ALL = list(FAMILIES.values())


def key_values(family):
    return [layer for layer in layers(family) if layer.is_key_or_value]


def linear_and_conv(unet):
    return {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def test_demo_table_is_the_demo_file():
    prefix = "model.diffusion_model."
    with safe_open(DEMO_FILE, framework="pt") as file:
        shapes = {
            key.removeprefix(prefix).removesuffix(".weight"): tuple(file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118 - a handle, not a dict
            if key.startswith(prefix) and key.endswith(".weight")
        }
    # Norms are the only weights of one dimension.
    in_file = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    assert {layer.compvis: layer.shape for layer in layers(DEMO)} == in_file


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
def test_table_is_what_diffusers_builds(family):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET_CONFIGS[family.key])
    assert {layer.name: layer.shape for layer in layers(family)} == linear_and_conv(unet)


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
def test_compvis_names_are_what_diffusers_converts(family):
    checkpoint = {
        f"model.diffusion_model.{layer.compvis}.{part}": f"{layer.name}.{part}"
        for layer in layers(family)
        for part in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, UNET_CONFIGS[family.key])
    assert converted == {name: name for name in checkpoint.values()}


def test_table_of_the_tiny_test_model():
    assert {layer.name: layer.shape for layer in layers(TINY)} == linear_and_conv(tiny_unet())


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
def test_names_are_unique(family):
    table = layers(family)
    assert len({layer.name for layer in table}) == len(table)
    assert len({layer.compvis for layer in table}) == len(table)


@pytest.mark.parametrize(
    "family, modules, key_value, attention",
    # modules: K/V layers. Weights of K and V, and of all of attn2, are out * in added up by hand:
    # SD1's attn2 widths are 5 x 320, 5 x 640, 6 x 1280; XL's are 10 x 640, 60 x 1280.
    [
        (SD1, 32, 2 * 768 * 12480, 2 * 768 * 12480 + 2 * 12_390_400),
        (SD2, 32, 2 * 1024 * 12480, 2 * 1024 * 12480 + 2 * 12_390_400),
        (SDXL, 140, 2 * 2048 * 83200, 2 * 2048 * 83200 + 2 * 102_400_000),
        (DEMO, 14, 2 * 128 * 1152, 2 * 128 * 1152 + 2 * 196_608),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_counts(family, modules, key_value, attention):
    assert len(key_values(family)) == modules == 2 * len(cross_attention_names(family))
    assert sum(prod(layer.shape) for layer in key_values(family)) == key_value
    all_attention = [layer for layer in layers(family) if layer.is_cross_attention]
    assert sum(prod(layer.shape) for layer in all_attention) == attention


@pytest.mark.parametrize(
    "family, millions", [(SD1, 859.5), (SD2, 865.9), (SDXL, 2567.5)], ids=["sd1", "sd2", "sdxl"]
)
def test_weights_are_nearly_the_whole_unet(family, millions):
    # Published sizes count norms and biases too, which are less than a thousandth.
    total = sum(prod(layer.shape) for layer in layers(family)) / 1e6
    assert millions * 0.999 < total < millions


def test_layer_properties():
    by_name = {layer.name: layer for layer in layers(SD1)}
    block = "mid_block.attentions.0.transformer_blocks.0"
    to_k, to_q = by_name[f"{block}.attn2.to_k"], by_name[f"{block}.attn2.to_q"]
    own_k, conv = by_name[f"{block}.attn1.to_k"], by_name["conv_in"]
    asked = to_k, to_q, own_k, conv
    assert [layer.is_key_or_value for layer in asked] == [True, False, False, False]
    assert [layer.is_cross_attention for layer in asked] == [True, True, False, False]


@pytest.mark.parametrize(
    "family, convs",
    # A level without attention has its upsampler in the attention's place.
    [
        (SD1, ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]),
        (SDXL, ["output_blocks.2.2.conv", "output_blocks.5.2.conv"]),
    ],
    ids=["sd1", "sdxl"],
)
def test_upsamplers(family, convs):
    assert [layer.compvis for layer in layers(family) if "upsamplers" in layer.name] == convs


def test_cross_attention_in_forward_order():
    names = cross_attention_names(SD1)
    assert names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert names[6] == "mid_block.attentions.0.transformer_blocks.0.attn2"
    assert names[15] == "up_blocks.3.attentions.2.transformer_blocks.0.attn2"


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
@pytest.mark.parametrize("naming", ["name", "compvis"])
def test_identify(family, naming):
    shapes = {getattr(layer, naming): torch.Size(layer.shape) for layer in key_values(family)}
    assert identify(shapes) is family


def test_identify_refuses_what_only_resembles():
    shapes = {layer.name: layer.shape for layer in key_values(SD1)}
    first = next(iter(shapes))
    assert identify({}) is None
    assert identify({name: shapes[name] for name in list(shapes)[1:]}) is None
    assert identify(shapes | {"more.attn2.to_k": (320, 768)}) is None
    assert identify(shapes | {first: (320, 1024)}) is None
    assert identify(shapes | {first: (768, 320)}) is None
    mixed = {layer.compvis: layer.shape for layer in key_values(SD1)}
    assert identify({**dict(list(shapes.items())[:16]), **dict(list(mixed.items())[16:])}) is None


def lora_names(places, depth=1):
    return {
        f"lora_unet_{place}_transformer_blocks_{block}_attn2_{part}"
        for place in places
        for block in range(depth)
        for part in ("to_k", "to_v")
    }


SD_PLACES = [
    *(f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)),
    "mid_block_attentions_0",
    *(f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)),
]
SD_TWINS = [
    *(f"input_blocks_{i}_1" for i in (1, 2, 4, 5, 7, 8)),
    "middle_block_1",
    *(f"output_blocks_{i}_1" for i in range(3, 12)),
]


@pytest.mark.parametrize("family", [SD1, SD2], ids=["sd1", "sd2"])
def test_sd_files_use_diffusers_blocks(family):
    assert {file_name(family, layer) for layer in key_values(family)} == lora_names(SD_PLACES)
    known = {name for name, layer in known_names(family).items() if layer.is_key_or_value}
    assert known == lora_names(SD_PLACES) | lora_names(SD_TWINS)


def test_sdxl_files_use_sgm_blocks():
    wanted = lora_names([f"input_blocks_{i}_1" for i in (4, 5)], 2)
    wanted |= lora_names([f"input_blocks_{i}_1" for i in (7, 8)] + ["middle_block_1"], 10)
    wanted |= lora_names([f"output_blocks_{i}_1" for i in (0, 1, 2)], 10)
    wanted |= lora_names([f"output_blocks_{i}_1" for i in (3, 4, 5)], 2)
    assert {file_name(SDXL, layer) for layer in key_values(SDXL)} == wanted
    assert lora_names(["down_blocks_1_attentions_0"], 2) < set(known_names(SDXL))
    assert lora_names(["mid_block_attentions_0", "up_blocks_0_attentions_2"], 10) < set(
        known_names(SDXL)
    )


@pytest.mark.parametrize(
    "family, one, other",
    [
        (SD1, "down_blocks_1_attentions_0", "input_blocks_4_1"),
        (SD1, "up_blocks_3_attentions_2", "output_blocks_11_1"),
        (SDXL, "down_blocks_2_attentions_1", "input_blocks_8_1"),
        (SDXL, "up_blocks_1_attentions_0", "output_blocks_3_1"),
        (SDXL, "mid_block_attentions_0", "middle_block_1"),
    ],
)
def test_twin_names_mean_one_layer(family, one, other):
    names = known_names(family)
    rest = "transformer_blocks_0_attn2_to_v"
    assert names[f"lora_unet_{one}_{rest}"] is names[f"lora_unet_{other}_{rest}"]


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
def test_no_two_layers_share_a_lora_name(family):
    # Dots become underscores, so two paths could fall together.
    assert len(known_names(family)) == 2 * len(layers(family)) + len(text_layers(family))


TEXT_CONFIGS = {
    (key, part): config[f"{part}/config.json"]
    for key, config in PIPELINES.items()
    for part in ("text_encoder", "text_encoder_2")
    if f"{part}/config.json" in config
}


@pytest.mark.parametrize("key, part", TEXT_CONFIGS, ids="-".join)
def test_text_table_is_what_transformers_builds(key, part):
    make = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
    with torch.device("meta"):
        encoder = make(CLIPTextConfig(**TEXT_CONFIGS[key, part]))
    built = {
        f"{part}.text_model.{name.removeprefix('text_model.')}": shape
        for name, shape in linear_and_conv(encoder).items()
        if "text_projection" not in name
    }
    table = text_layers(FAMILIES[key])
    assert built == {x.name: x.shape for x in table if x.name.startswith(f"{part}.")}
    assert {x.name.partition(".")[0] for x in table} == {p for k, p in TEXT_CONFIGS if k == key}


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.key)
def test_names_of_text_layers(family):
    table, names = text_layers(family), layers_by_name(family)
    assert [name for name in names if names[name].is_text] == [layer.name for layer in table]
    assert list(names) == [layer.name for layer in (*layers(family), *table)]
    count = sum(6 * encoder.blocks for encoder in family.texts)
    assert len({layer.compvis for layer in table}) == len(table) == count
    parts = {file_name(family, layer).partition("_text_model_")[0] for layer in table}
    assert parts == ({"lora_te1", "lora_te2"} if family is SDXL else {"lora_te"})
    assert not any(layer.is_key_or_value or layer.is_cross_attention for layer in table)


def test_a_text_layer():
    layer = text_layers(SDXL)[-1]
    assert layer.name == "text_encoder_2.text_model.encoder.layers.31.mlp.fc2"
    assert layer.compvis == "clip_g.transformer.text_model.encoder.layers.31.mlp.fc2"
    assert layer.shape == (1280, 5120) and layer.is_text
    assert file_name(SDXL, layer) == "lora_te2_text_model_encoder_layers_31_mlp_fc2"
    assert known_names(SDXL)[file_name(SDXL, layer)] is layer
