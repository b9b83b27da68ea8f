"""Diffusion transformers at their published sizes, of ComfyUI's own classes, and texts for them.

Needs ComfyUI on the path. Widths, depths and what a text encoder gives are those of the released
models; weights are random, or there are none (torch's "meta" device).
"""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
    "vec_in_dim": None, "mlp_ratio": 3.0, "axes_dim": [32] * 4, "theta": 2000, "qkv_bias": False,
    "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "txt_ids_dims": [3],
    "guidance_embed": False,
}  # fmt: skip
CHROMA = {name: value for name, value in FLUX.items() if name != "guidance_embed"} | {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64,
    "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, "vec_in_dim": None,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "input_size": None,
    "adm_in_channels": 2048, "pos_embed_scaling_factor": None, "qk_norm": "rms",
}  # fmt: skip
LUMINA = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "qk_norm": True}
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "freq_dim": 256,
    "in_dim": 16, "out_dim": 16, "qk_norm": True, "cross_attn_norm": True,
}  # fmt: skip


def _sd3(depth: int, patches: int, dual: int) -> dict[str, Any]:
    width = {"in_features": 4096, "out_features": 64 * depth}
    return SD3 | {
        "depth": depth, "num_patches": patches**2, "pos_embed_max_size": patches,
        "x_block_self_attn_layers": list(range(dual)),
        "context_embedder_config": {"target": "torch.nn.Linear", "params": width},
    }  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A released model.

    Attributes:
        kind: ComfyUI's class of it in ``supported_models``.
        context: width of the text encoder's states.
        tokens: at least as many; encoders pad to it.
        extra: tokens that a template adds to those of the words.
        pooled: width of the pooled text, or 0.
        depth: settings that hold numbers of blocks.
    """

    title: str
    kind: str
    config: dict[str, Any]
    context: int
    tokens: int = 1
    extra: int = 1
    pooled: int = 0
    depth: tuple[str, ...] = field(default=("depth", "depth_single_blocks"))

    def cut(self, blocks: int) -> dict[str, Any]:
        """The configuration with so many blocks of each kind, 0 for all."""
        config = dict(self.config)
        for name in self.depth if blocks else ():
            config[name] = min(config[name], blocks)
        if self.kind == "SD3" and blocks:
            config["num_blocks"] = blocks
        if self.kind == "HiDream":
            layers = config["num_layers"] + config["num_single_layers"]
            config["llama_layers"] = [min(i, 31) for i in range(layers)]
        return config


SIZES = {
    "z-image": Size(
        "Z-Image", "ZImage",
        LUMINA | {"dim": 3840, "cap_feat_dim": 2560, "n_layers": 30, "n_heads": 30,
                  "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
                  "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
                  "time_scale": 1000.0, "pad_tokens_multiple": 32},
        2560, extra=8, depth=("n_layers",),
    ),
    "flux": Size("Flux.1", "Flux", FLUX, 4096, 256, pooled=768),
    "flux2-klein-4b": Size(
        "Flux.2 klein 4B", "Flux2",
        FLUX2 | {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 7680, "depth": 5,
                 "depth_single_blocks": 20}, 7680, 512,
    ),
    "flux2-klein-9b": Size(
        "Flux.2 klein 9B", "Flux2",
        FLUX2 | {"hidden_size": 4096, "num_heads": 32, "context_in_dim": 12288, "depth": 8,
                 "depth_single_blocks": 24}, 12288, 512,
    ),
    "flux2-dev": Size(
        "Flux.2 dev", "Flux2",
        FLUX2 | {"hidden_size": 6144, "num_heads": 48, "context_in_dim": 15360, "depth": 8,
                 "depth_single_blocks": 48, "guidance_embed": True}, 15360, 512,
    ),
    "qwen-image": Size(
        "Qwen-Image", "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}, 3584, extra=5,
        depth=("num_layers",),
    ),
    "krea2": Size(
        "Krea 2", "Krea2",
        {"image_model": "krea2", "features": 6144, "channels": 16, "patch": 2, "layers": 28,
         "heads": 48, "kvheads": 12, "txtlayers": 12, "txtdim": 2560},
        12 * 2560, extra=5, depth=("layers",),
    ),
    "anima": Size(
        "Anima", "Anima",
        {"image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
         "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
         "model_channels": 2048, "concat_padding_mask": True, "num_blocks": 28, "num_heads": 16,
         "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
         "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 256,
         "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0,
         "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False},
        1024, 512, depth=("num_blocks",),
    ),
    "sd3.5-medium": Size(
        "Stable Diffusion 3.5 medium", "SD3", _sd3(24, 384, 13), 4096, 154, pooled=2048, depth=(),
    ),
    "sd3.5-large": Size(
        "Stable Diffusion 3.5 large", "SD3", _sd3(38, 192, 0), 4096, 154, pooled=2048, depth=(),
    ),
    "chroma": Size("Chroma", "Chroma", CHROMA, 4096),
    "hidream": Size(
        "HiDream", "HiDream",
        {"image_model": "hidream", "in_channels": 16, "out_channels": 16, "patch_size": 2,
         "attention_head_dim": 128, "num_attention_heads": 20, "axes_dims_rope": [64, 32, 32],
         "caption_channels": [4096, 4096], "max_resolution": [128, 128], "num_layers": 16,
         "num_single_layers": 32, "num_routed_experts": 4, "num_activated_experts": 2,
         "text_emb_dim": 2048},
        4096, 128, pooled=2048, depth=("num_layers", "num_single_layers"),
    ),
    "lumina2": Size(
        "Lumina 2", "Lumina2",
        LUMINA | {"dim": 2304, "cap_feat_dim": 2304, "n_layers": 26, "n_heads": 24,
                  "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
                  "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
        2304, depth=("n_layers",),
    ),
    "ernie": Size(
        "Ernie Image", "ErnieImage",
        {"image_model": "ernie", "num_layers": 36}, 3072, extra=1, depth=("num_layers",),
    ),
    "wan-1.3b": Size(
        "Wan 2.1 1.3B", "WAN21_T2V",
        WAN | {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 4096, 512,
        depth=("num_layers",),
    ),
    "wan-14b": Size(
        "Wan 2.1 14B", "WAN21_T2V",
        WAN | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, 4096, 512,
        depth=("num_layers",),
    ),
}  # fmt: skip


class Words:
    """In place of a text encoder: random states that depend on the text alone, a token a word."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def length(self, text: str) -> int:
        return max(self.size.tokens, len(text.split()) + self.size.extra)

    def tokenize(self, text: str, **options: Any) -> str:
        return text

    def encode_from_tokens(self, text: str, **options: Any) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        size, count = self.size, self.length(text)

        def states(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, generator=generator)

        found = {"cond": states(count, size.context), "pooled_output": None}
        if size.pooled:
            found["pooled_output"] = states(size.pooled)
        if size.kind in ("Lumina2", "ZImage"):
            found["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        if size.kind == "HiDream":
            found["conditioning_llama3"] = states(32, count, size.context)
        if size.kind == "Anima":
            found["t5xxl_ids"] = torch.randint(100, (count,), generator=generator)
            found["t5xxl_weights"] = torch.ones(count)
        return found


def start(gpu: bool = False) -> None:
    """Make ComfyUI, as on a CPU unless a GPU is asked for, and this project importable."""
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("Set COMFYUI_PATH to a ComfyUI.")
    sys.path[:0] = os.environ["COMFYUI_PATH"], str(Path(__file__).resolve().parent.parent)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not gpu
    comfy.cli_args.args.use_pytorch_cross_attention = True  # as on a GPU
    logging.disable(logging.WARNING)


def config_of(size: Size, blocks: int) -> dict[str, Any]:
    """The configuration as this ComfyUI takes it, with so many blocks of each kind, 0 for all."""
    from comfy.ldm.flux.model import FluxParams

    config = size.cut(blocks)
    if "txt_ids_dims" not in FluxParams.__dataclass_fields__:  # before ComfyUI 0.33
        for name in ("txt_ids_dims", *(("vec_in_dim",) if size.kind == "Chroma" else ())):
            config.pop(name, None)
    return config


def build(size: Size, blocks: int, dtype: Any, device: str) -> Any:
    """A MODEL's inner model; its weights are whatever memory holds.

    Args:
        blocks: of each kind, 0 for all.

    Raises:
        LookupError: this ComfyUI lacks the class.
    """
    import comfy.supported_models
    import torch

    kind = getattr(comfy.supported_models, size.kind, None)
    if kind is None:
        raise LookupError(f"This ComfyUI has no {size.kind}.")
    made = kind(config_of(size, blocks) | {"dtype": dtype})
    made.set_inference_dtype(dtype, None)
    with torch.inference_mode():
        return made.get_model({}, device=torch.device(device))
