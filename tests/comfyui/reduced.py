"""Checkpoints of the real families with fewer levels, blocks and text layers, and random weights.

They are wide enough for ComfyUI's detection and diffusers' converters to take them for real ones.
"""

import json
from contextlib import contextmanager
from dataclasses import replace

import torch

from .conftest import ROOT

V_MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
COMMON = {
    "image_size": 32, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "use_temporal_attention": False, "legacy": False, "adm_in_channels": None,
}  # fmt: skip
# Of a family: what is less, what the U-Net's config is in ComfyUI and in diffusers, and the layers
# of ComfyUI's text encoders. The last of SD 2's is never used, and diffusers' copies lack it.
SD1 = {
    "family": {"channels": (320, 320), "blocks": 1, "depth": (1, 0)},
    "comfy": {
        "channel_mult": [1, 1], "num_res_blocks": [1, 1], "transformer_depth": [1, 0],
        "transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1,
        "context_dim": 768, "use_linear_in_transformer": False,
    },
    "unet": {
        "layers_per_block": 1, "block_out_channels": [320, 320],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "texts": (2,),
}  # fmt: skip
SD2 = {
    "family": {"channels": (320, 320, 320, 320)},
    "comfy": {
        "channel_mult": [1, 1, 1, 1], "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 1024, "use_linear_in_transformer": True,
    },
    "unet": {"block_out_channels": [320, 320, 320, 320], "attention_head_dim": 5},
    "texts": (2,),
}  # fmt: skip
SDXL = {
    "family": {"channels": (320, 320, 320)},
    "comfy": {
        "channel_mult": [1, 1, 1], "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "context_dim": 2048, "use_linear_in_transformer": True,
        "adm_in_channels": 2816, "num_classes": "sequential",
    },
    "unet": {"block_out_channels": [320, 320, 320], "attention_head_dim": 5},
    "texts": (3, 3),
}  # fmt: skip
REDUCED = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
CONFIGS = {"sd1": "SD15", "sd2": "SD20", "sdxl": "SDXL"}
INSTRUCT = {"sd1": "SD15_instructpix2pix", "sdxl": "SDXL_instructpix2pix"}


@contextmanager
def known(pack, monkeypatch, key):
    """The pack takes the reduced family for the family itself, for a while."""
    families, load = pack("fmn.models.families"), pack("fmn.hosts.diffusers.load")
    reduced, texts = REDUCED[key], REDUCED[key]["texts"]
    real = families.FAMILIES[key]
    encoders = tuple(replace(text, blocks=count) for text, count in zip(real.texts, texts))
    family = replace(real, texts=encoders, **reduced["family"])
    config = json.loads((ROOT / "fmn" / "assets" / "pipelines.json").read_text())[key]
    config["unet/config.json"] |= reduced["unet"]
    for part, count in zip(("text_encoder", "text_encoder_2"), texts):
        config[f"{part}/config.json"]["num_hidden_layers"] = count
    with monkeypatch.context() as patched:
        patched.setitem(families.FAMILIES, key, family)
        patched.setattr(load, "_config", lambda family: json.loads(json.dumps(config)))
        yield family


def text_options(key):
    """ComfyUI's ``te_model_options`` that leave text layers out."""
    counts = REDUCED[key]["texts"]
    if key == "sd2":
        return {"clip_h_model_config": {"num_hidden_layers": counts[0] + 1}}
    names = "clip_l", "clip_g"
    return {f"{name}_model_config": {"num_hidden_layers": n} for name, n in zip(names, counts)}


def write_checkpoint(path, key, channels=4, more=None):
    """Save a checkpoint as ComfyUI would.

    Args:
        channels: that the U-Net reads.
        more: tensors to add or to replace.
    """
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models

    name = INSTRUCT.get(key) if channels == 8 else None
    config = getattr(comfy.supported_models, name or CONFIGS[key])
    config = config(COMMON | {"in_channels": channels} | REDUCED[key]["comfy"])
    config.set_inference_dtype(torch.float16, None)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = config.get_model({}, "", device=cpu)
        options = text_options(key) | {"dtype": torch.float16}
        clip = comfy.sd.CLIP(config.clip_target({}), model_options=options)
        vae = comfy.sd.VAE(sd=vae_marks(), dtype=torch.float16)
        generator = torch.Generator().manual_seed(0)
        for part in (model.diffusion_model, clip.cond_stage_model):
            fill(part, generator)
        for parameter in vae.first_stage_model.parameters():  # no test uses it
            parameter.zero_()
        patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
        comfy.sd.save_checkpoint(str(path), patcher, clip, vae, extra_keys=more or {})
    return path


def vae_marks():
    """The keys by which ComfyUI tells the usual autoencoder."""
    return {
        "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
        "post_quant_conv.weight": torch.zeros(4, 4, 1, 1),
        "encoder.down.2.downsample.conv.weight": torch.zeros(512, 512, 3, 3),
    }


def fill(module, generator):
    """Scale-preserving noise for matrices, norms near 1, biases near 0; a million numbers, used
    over and over."""
    noise = torch.randn(1 << 20, generator=generator)
    for name, parameter in module.named_parameters():
        start = int(torch.randint(1 << 19, (1,), generator=generator))
        part = noise[start : start + parameter.numel()]
        values = part.repeat(-(-parameter.numel() // len(part)))[: parameter.numel()]
        if parameter.dim() > 1:
            values = values * (0.02 if "embedding" in name else parameter[0].numel() ** -0.5)
        else:
            values = (not name.endswith("bias")) + 0.02 * values
        parameter.copy_(values.view_as(parameter))
