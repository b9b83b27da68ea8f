"""Tiny models of ComfyUI's own classes with random weights, and a mock of their text encoders."""

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
CONFIGS = {"Flux": FLUX, "SD3": SD3, "Lumina2": LUMINA}


class Words:
    """A mock of CLIP: random conditioning that depends on the text alone, a token a word."""

    def __init__(self, masked=False):
        self.masked = masked

    def tokenize(self, text, **options):
        return text

    def encode_from_tokens(self, text, return_pooled, return_dict):
        generator = torch.Generator().manual_seed(sum(map(ord, text)))
        count = 2 + len(text.split())
        found = {"cond": torch.randn(1, count, WIDTH, generator=generator), "pooled_output": None}
        if self.masked:
            found["attention_mask"] = torch.ones(1, count, dtype=torch.long)
        else:
            found["pooled_output"] = torch.randn(1, POOLED, generator=generator)
        return found


def make(name, changes):
    """A MODEL of a class by its name, with some of its config changed."""
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    config = CONFIGS[name] | {"dtype": torch.float32} | changes
    if name == "Flux" and "txt_ids_dims" in FluxParams.__dataclass_fields__:  # ComfyUI 0.33
        config = {"txt_ids_dims": []} | config
    # As in a running server.
    with torch.inference_mode():
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
