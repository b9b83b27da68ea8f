"""Tiny models of ComfyUI's own classes with random weights, and a mock of their text encoders."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

WIDTH, POOLED = 12, 8
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": POOLED, "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "num_blocks": 2, "adm_in_channels": POOLED,
    "context_size": WIDTH, "input_size": None, "num_patches": 64, "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None, "qkv_bias": True,
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64},
    },
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 24, "cap_feat_dim": WIDTH,
    "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [4, 4, 4], "axes_lens": [64, 32, 32],
    "multiple_of": 8,
}  # fmt: skip
FLUX2 = FLUX | {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
    "vec_in_dim": None, "mlp_ratio": 3.0, "axes_dim": [4, 4, 4, 4], "theta": 2000,
    "qkv_bias": False, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2,
    "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True,
    "in_dim": 64, "out_dim": 32, "hidden_dim": 16, "n_layers": 1,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12],
    "n_refiner_layers": 1, "qk_norm": True, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
HIDREAM = {
    "image_model": "hidream", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": [8, 4, 4],
    "caption_channels": [WIDTH, WIDTH], "max_resolution": [32, 32], "llama_layers": [0, 1],
    "num_layers": 1, "num_single_layers": 1, "num_routed_experts": 2, "num_activated_experts": 1,
    "text_emb_dim": POOLED,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 64, "freq_dim": 16,
    "text_dim": WIDTH, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
KREA = {
    "image_model": "krea2", "features": 32, "tdim": 16, "txtdim": WIDTH // 2, "txtlayers": 2,
    "heads": 2, "kvheads": 1, "txtheads": 1, "txtkvheads": 1, "layers": 2, "multiplier": 2,
}  # fmt: skip
ANIMA = {
    "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
    "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 32, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
ERNIE = {
    "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2,
    "ffn_hidden_size": 64, "text_in_dim": WIDTH, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
CONFIGS = {
    "Flux": FLUX, "SD3": SD3, "Lumina2": LUMINA, "Flux2": FLUX2, "Chroma": CHROMA,
    "ZImage": Z_IMAGE, "QwenImage": QWEN, "HiDream": HIDREAM, "WAN21_T2V": WAN, "Krea2": KREA,
    "Anima": ANIMA, "ErnieImage": ERNIE,
}  # fmt: skip


NEWER = {
    "Flux": {"txt_ids_dims": []}, "Flux2": {"txt_ids_dims": [3]},
    "Chroma": {"txt_ids_dims": [], "vec_in_dim": None},
}  # fmt: skip


class Words:
    """A mock of CLIP: random conditioning that depends on the text alone, a token a word.

    Args:
        name: of the model's class, which decides what there is beside the text's states.
    """

    def __init__(self, name="Flux"):
        self.name = name

    def tokenize(self, text, **options):
        return text

    def encode_from_tokens(self, text, return_pooled, return_dict):
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        count = 2 + len(text.split())
        found = {"cond": torch.randn(1, count, WIDTH, generator=generator), "pooled_output": None}
        if self.name in ("Lumina2", "ZImage"):
            found["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        elif self.name in ("Flux", "SD3", "HiDream"):
            found["pooled_output"] = torch.randn(1, POOLED, generator=generator)
        if self.name == "HiDream":
            found["conditioning_llama3"] = torch.randn(1, 2, count, WIDTH, generator=generator)
        if self.name == "Anima":
            found["t5xxl_ids"] = torch.randint(100, (count,), generator=generator)
            found["t5xxl_weights"] = torch.ones(count)
        return found


@contextmanager
def small_adapter():
    """Anima's text adapter has fixed sizes, of 100 million weights."""
    from comfy.ldm.anima import model

    whole = model.LLMAdapter
    small = {"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH}
    model.LLMAdapter = partial(whole, **small, num_layers=1, num_heads=1)
    yield
    model.LLMAdapter = whole


def make(name, changes):
    """A MODEL of a class by its name, with some of its config changed."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    if not hasattr(comfy.supported_models, name):
        pytest.skip(f"This ComfyUI has no {name}.")
    config = CONFIGS[name] | {"dtype": torch.float32} | changes
    if name in NEWER and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # ComfyUI 0.33
        config = NEWER[name] | config
    # As in a running server.
    with torch.inference_mode(), small_adapter() if name == "Anima" else nullcontext():
        model = getattr(comfy.supported_models, name)(config).get_model({}, device="cpu")
        generator = torch.Generator().manual_seed(0)
        for tensor in model.diffusion_model.state_dict().values():
            spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, device, device)


def esd_settings(pack, **more):
    changes = {"steps": 4, "sampling_steps": 4, "seed": 1, "size": 64, "lr": 0.01} | more
    return pack("fmn.methods.esd").Settings(**changes)
