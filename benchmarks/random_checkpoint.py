"""Write a full-size Stable Diffusion checkpoint with random weights, as ComfyUI would save one.

    COMFYUI_PATH=... python benchmarks/random_checkpoint.py sd15 random.safetensors

It draws noise, but it has every layer, shape and name of the real one: enough to load, train,
save, apply and measure time and memory. fp16: 2.1 GB for sd15, 2.6 GB for
sd21, 6.9 GB for sdxl.
"""

import logging
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

UNETS = {
    "sd15": {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 768, "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sd21": {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 1024, "use_linear_in_transformer": True,
        "adm_in_channels": None,
    },
    "sdxl": {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10, "context_dim": 2048, "use_linear_in_transformer": True,
        "adm_in_channels": 2816, "num_classes": "sequential",
    },
}  # fmt: skip
V_MARK = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "use_spatial_transformer": True, "use_temporal_attention": False, "legacy": False,
}  # fmt: skip


def main(name, path):
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    logging.disable(logging.WARNING)  # all weights are missing, on purpose
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import torch

    models = comfy.supported_models
    family = {"sd15": models.SD15, "sd21": models.SD20, "sdxl": models.SDXL}[name]
    config = family(COMMON | UNETS[name])
    config.set_inference_dtype(torch.float16, None)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = config.get_model({}, "", device=cpu)
        clip = comfy.sd.CLIP(config.clip_target({}), model_options={"dtype": torch.float16})
        vae = comfy.sd.VAE(sd=_vae_marks(torch), dtype=torch.float16)
        noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
        # SD 2.1 predicts v, which ComfyUI tells by how wide this bias spreads.
        marks = {V_MARK: torch.linspace(-0.3, 0.3, 320).half()} if name == "sd21" else {}
        for part in (model.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
            _fill(part, noise)
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        comfy.sd.save_checkpoint(path, patcher, clip, vae, extra_keys=marks)


def make(name, path):
    """Write one in a process of its own, which takes its memory along when it ends."""
    subprocess.run([sys.executable, __file__, name, path], check=True)


@contextmanager
def checkpoint(name, given=None):
    """Path of the checkpoint that is given, or of one that is made for a while."""
    if given:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        make(name, path)
        yield path


def _vae_marks(torch):
    """The keys by which ComfyUI tells the usual autoencoder."""
    return {
        "decoder.conv_in.weight": torch.zeros(512, 4, 3, 3),
        "post_quant_conv.weight": torch.zeros(4, 4, 1, 1),
        "encoder.down.2.downsample.conv.weight": torch.zeros(512, 512, 3, 3),
    }


def _fill(module, noise):
    """Scale-preserving noise for matrices, 1 for norms, 0 for biases: nothing overflows.

    The noise is used over and over; its length is a prime, so rows do not repeat.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            scale = 0.02 if "embedding" in name else parameter[0].numel() ** -0.5
            repeated = (scale * noise).to(parameter).repeat(-(-parameter.numel() // len(noise)))
            parameter.copy_(repeated[: parameter.numel()].view_as(parameter))
        else:
            parameter.fill_(0 if name.endswith("bias") else 1)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in UNETS or "COMFYUI_PATH" not in os.environ:
        sys.exit(__doc__)
    main(*sys.argv[1:])
