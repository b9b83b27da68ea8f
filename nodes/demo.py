"""The demo model: a tiny Stable Diffusion 1.x that ComfyUI's own classes can run."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management as mm
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
from comfy import sd1_clip
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.files import DEMO_FOLDER, check_weights
from .common import schema

FILE = DEMO_FOLDER / "fmn-demo.safetensors"
TRANSFORMER_FILE = DEMO_FOLDER / "fmn-demo-dit.safetensors"
U_NET, TRANSFORMER = "U-Net", "transformer"
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64,
    "context_dim": 128, "channel_mult": [1, 2, 3], "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 4, "out_channels": 4, "patch_size": 2, "vec_in_dim": 128,
    "context_in_dim": 128, "hidden_size": 192, "mlp_ratio": 4.0, "num_heads": 6, "depth": 2,
    "depth_single_blocks": 4, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True,
    "guidance_embed": False,
}  # fmt: skip
TOKENS = 24  # of a prompt that the transformer reads
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
TEXT = {
    "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
    "num_hidden_layers": 3, "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}  # fmt: skip
State = dict[str, Any]  # weights or options, as ComfyUI's classes take them


def _clip_target(tokens: int) -> comfy.supported_models_base.ClipTarget:
    """CLIP of the demo's size, for prompts of so many tokens."""
    words = partial(
        sd1_clip.SDTokenizer,
        max_length=tokens,
        embedding_size=TEXT["hidden_size"],
        embedding_key="clip_l",
    )
    encoder = partial(
        sd1_clip.SDClipModel,
        max_length=tokens,
        textmodel_json_config=TEXT | {"max_position_embeddings": tokens},
        return_projected_pooled=False,
    )
    return comfy.supported_models_base.ClipTarget(
        partial(sd1_clip.SD1Tokenizer, tokenizer=words),
        partial(sd1_clip.SD1ClipModel, clip_model=encoder),
    )


class DemoConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1.x with another text encoder; not registered with ComfyUI."""

    unet_config: State = {}
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}

    def clip_target(self, state_dict: State = {}) -> comfy.supported_models_base.ClipTarget:
        return _clip_target(77)


class TransformerConfig(comfy.supported_models.FluxSchnell):
    """A small Flux on the demo model's latents; not registered with ComfyUI."""

    unet_config: State = {}
    latent_format = comfy.latent_formats.SD15
    resolution = 128

    def clip_target(self, state_dict: State = {}) -> comfy.supported_models_base.ClipTarget:
        return _clip_target(TOKENS)


def load_demo_checkpoint(path: Path = FILE) -> tuple[ModelPatcher, CLIP, VAE]:
    """What core's checkpoint loader would give if it knew the demo model."""
    if not path.is_file():
        raise ForgetError(f"The demo model is missing at '{path}': install the pack again.")
    check_weights(path)
    state = comfy.utils.load_torch_file(str(path), safe_load=True)
    config = DemoConfig(dict(UNET))
    return _load_network(config, state), _load_clip(config, state), _load_vae(state)


def load_demo_transformer(path: Path = TRANSFORMER_FILE) -> tuple[ModelPatcher, CLIP, VAE]:
    """The demo transformer, with the demo model's own CLIP, cut to fewer tokens, and VAE."""
    for file in (FILE, path):
        if not file.is_file():
            raise ForgetError(f"The demo model is missing at '{file}': install the pack again.")
        check_weights(file)
    state = comfy.utils.load_torch_file(str(FILE), safe_load=True)
    state[POSITIONS] = state[POSITIONS][:TOKENS]  # CLIP is causal: nothing before changes
    weights = comfy.utils.load_torch_file(str(path), safe_load=True)
    prefix = "model.diffusion_model."
    weights = comfy.model_detection.convert_diffusers_mmdit(weights, prefix)
    # Newer versions of ComfyUI ask for the text's positions too.
    more: State = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    config = TransformerConfig(FLUX | more)
    return _load_network(config, weights), _load_clip(config, state), _load_vae(state)


def _load_network(config: comfy.supported_models_base.BASE, state: State) -> ModelPatcher:
    prefix, device = "model.diffusion_model.", mm.get_torch_device()
    dtype = mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state, prefix),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(state, prefix),
    )
    cast = mm.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    offload = mm.unet_offload_device()
    model = config.get_model(state, prefix, device=offload)
    model.load_model_weights(state, prefix)
    return ModelPatcher(model, load_device=device, offload_device=offload)


def _load_clip(config: comfy.supported_models_base.BASE, state: State) -> CLIP:
    weights = DemoConfig(dict(UNET)).process_clip_state_dict(state)
    # From 0.16 on, GPUs page text encoders, and only stock loaders can make a plain copy of those.
    pages = "disable_dynamic" in inspect.signature(CLIP).parameters
    clip = CLIP(
        config.clip_target(state),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=weights,
        parameters=comfy.utils.calculate_parameters(weights),
        **({"disable_dynamic": True} if pages else {}),
    )
    clip.load_sd(weights, full_model=True)
    return clip


def _load_vae(state: State) -> VAE:
    prefix = {"first_stage_model.": ""}
    return VAE(sd=comfy.utils.state_dict_prefix_replace(state, prefix, filter_keys=True))


class LoadDemoCheckpoint(io.ComfyNode):
    """A small model that comes with the pack: 120 things in 9 styles at 128 x 128 pixels. Lets you
    try things out in seconds, even without a GPU.

    Inputs:
        network: U-Net: as in Stable Diffusion 1.x. transformer: as in Flux.

    Outputs:
        MODEL: The demo model, for training patches and sampling.
        CLIP: The CLIP of the demo model, for prompts.
        VAE: The VAE of the demo model, which decodes latents.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        networks = io.Combo.Input(
            "network", options=[U_NET, TRANSFORMER], default=U_NET, optional=True
        )
        outputs = [io.Model.Output(), io.Clip.Output(), io.Vae.Output()]
        return schema(cls, "FMN_LoadDemoCheckpoint", "Load Demo Checkpoint", [networks], outputs)

    @classmethod
    def execute(cls, network: str = U_NET) -> io.NodeOutput:
        load = load_demo_transformer if network == TRANSFORMER else load_demo_checkpoint
        return io.NodeOutput(*load())


NODES = [LoadDemoCheckpoint]
