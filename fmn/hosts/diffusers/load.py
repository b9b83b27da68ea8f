"""Make a diffusers pipeline from the demo model, a single checkpoint file, or a folder.

Nothing is fetched: the configurations and the tokenizer's merges of the families lie in
``fmn/assets``.
"""

import inspect
import json
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    convert_ldm_unet_checkpoint,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ...errors import ForgetError, memory_ran_out
from ...files import DEMO_FOLDER, check_parts, check_texts, check_weights, open_safetensors
from ...models.families import DEMO, Family, UNetFamily
from ...patches.checkpoint import UNET_PREFIX, checkpoint_family

ASSETS = Path(__file__).parents[2] / "assets"
DEMO_FILE = DEMO_FOLDER / "fmn-demo.safetensors"
# TAESD works on latents of unit variance times 0.18215; the demo's own factor replaces it.
SD_SCALE = 0.18215
UNET_FILE = re.compile(
    r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)
Weights = dict[str, torch.Tensor]

# Text encoders of a family -> beginning of a checkpoint's keys -> what has them
PARTS = {
    1: {"cond_stage_model.": "text encoder", "first_stage_model.": "VAE"},
    2: {
        "conditioner.embedders.0.": "first text encoder",
        "conditioner.embedders.1.": "second text encoder",
        "first_stage_model.": "VAE",
    },
}
EDM = {"edm_mean", "edm_vpred.sigma_max"}
V_MARK = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline for ``demo``, a .safetensors checkpoint of a known family, or a folder.

    Raises:
        ForgetError: there is no such model, its family is unknown, or parts of it are missing.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if str(path) == "demo":
        return _demo(dtype)
    path = Path(path)
    if path.is_dir():
        return _folder(path, dtype)
    if not path.is_file():
        raise ForgetError(
            f"There is no model '{path}': give demo, a .safetensors checkpoint, "
            "or a diffusers folder."
        )
    check_weights(path)
    if path.suffix.lower() != ".safetensors":
        raise ForgetError(
            f"'{path.name}' is no .safetensors checkpoint, the only kind that is read here, since "
            "others can run code: convert it, such as with ComfyUI's Save Checkpoint."
        )
    family = checkpoint_family(path)
    _check_parts(path, family)
    try:
        return _demo(dtype, path) if family is DEMO else _single_file(path, family, dtype)
    except (OSError, LookupError, ValueError, RuntimeError, SingleFileComponentError) as error:
        if memory_ran_out(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ForgetError(
            f"'{path.name}' cannot be loaded ({type(error).__name__}: {reason:.200}): use a whole "
            "checkpoint, with U-Net, text encoder and VAE."
        ) from error


def _check_parts(path: Path, family: UNetFamily) -> None:
    """Refuse a file without text encoder or VAE: ComfyUI's ModelSave writes the U-Net alone."""
    with open_safetensors(path) as file:
        keys = list(file.keys())
    for beginning, part in PARTS[len(family.texts)].items():
        if not any(key.startswith(beginning) for key in keys):
            raise ForgetError(
                f"'{path.name}' lacks the {part}: use a whole checkpoint, with U-Net, text encoder "
                "and VAE."
            )


def _folder(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        check_texts(path)
        _refuse_quantised_parts(path)
        return DiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, local_files_only=True, variant=_variant(path)
        )
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        if memory_ran_out(error):
            raise
        check_parts(path)
        raise ForgetError(f"'{path}' is no complete diffusers folder: {error}") from error


def _variant(path: Path) -> str | None:
    """Which copy of a folder's weights to read: None is the plain one; else ``fp16`` or another."""
    files = [UNET_FILE.fullmatch(file.name) for file in path.glob("unet/*")]
    variants = {match[1] for match in files if match}
    return None if None in variants else min(variants, default=None)


def _refuse_quantised_parts(path: Path) -> None:
    for config in path.glob("*/config.json"):
        if "quantization_config" in json.loads(config.read_text("utf-8")):
            raise ForgetError(
                f"'{config.parent}' holds quantised weights, which cannot be trained on: use the "
                "same model in float16, bfloat16 or float32."
            )


def text_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, or one of the same parts that draws from text alone: inpainting and editing
    variants have pipelines that ask for pictures."""
    kind = type(pipeline).__name__
    if "Inpaint" not in kind and "InstructPix2Pix" not in kind:
        return pipeline
    xl = hasattr(pipeline, "text_encoder_2")
    make = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    names = inspect.signature(make.__init__).parameters
    parts = {name: part for name, part in pipeline.components.items() if name in names}
    drawing = make(**parts, **({} if xl else {"requires_safety_checker": False}))
    drawing.set_progress_bar_config(disable=True)
    return drawing


def _config(family: Family) -> dict[str, dict[str, Any]]:
    return json.loads((ASSETS / "pipelines.json").read_text("utf-8"))[family.key]


def make_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer. Ids follow from the merges: bytes, bytes that end a word, merges."""
    lines = (ASSETS / "clip_merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


def _single_file(path: Path, family: UNetFamily, dtype: torch.dtype) -> DiffusionPipeline:
    pair = len(family.texts) > 1
    make = StableDiffusionXLPipeline if pair else StableDiffusionPipeline
    tokenizers = {"tokenizer": make_tokenizer("<|endoftext|>" if family.key != "sd2" else "!")}
    if pair:
        tokenizers["tokenizer_2"] = make_tokenizer("!")
    channels, prediction = _input_channels(path), _prediction(path, family)
    with tempfile.TemporaryDirectory() as folder:
        contents = _config(family)
        contents["unet/config.json"]["in_channels"] = channels
        contents["scheduler/scheduler_config.json"] |= prediction
        for name, content in contents.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(content), "utf-8")
        return make.from_single_file(
            str(path), config=folder, torch_dtype=dtype, local_files_only=True, **tokenizers
        )


def _input_channels(path: Path) -> int:
    """Channels that a checkpoint's U-Net reads."""
    with open_safetensors(path) as file:
        return file.get_slice(f"{UNET_PREFIX}input_blocks.0.0.weight").get_shape()[1]


def _prediction(path: Path, family: UNetFamily) -> dict[str, Any]:
    """The scheduler's settings for a checkpoint, recognised as ComfyUI does.

    XL checkpoints carry keys for it. In Stable Diffusion 2.x the last block's norm tells: its bias
    spreads wider in the 768 px model, which has no variants with more inputs.
    """
    with open_safetensors(path) as file:
        keys = set(file.keys())
        if len(family.texts) > 1:
            if keys & EDM:
                raise ForgetError(
                    f"'{path.name}' was trained on EDM's noise levels, as CosXL and Playground 2.5 "
                    "are, which only ComfyUI supports: train on it inside ComfyUI."
                )
            v, zero_snr = "v_pred" in keys, {"v_pred", "ztsnr"} <= keys
        else:
            v = zero_snr = False
            if family.key == "sd2" and _input_channels(path) == 4:
                v = float(file.get_tensor(V_MARK).float().std(unbiased=False)) > 0.09
    kind = "v_prediction" if v else "epsilon"
    return {"prediction_type": kind, "rescale_betas_zero_snr": zero_snr}


def _demo(dtype: torch.dtype, path: Path = DEMO_FILE) -> DiffusionPipeline:
    """The demo model: a checkpoint of SD 1.x layout whose parts no standard loader knows."""
    if not path.is_file():
        raise ForgetError(f"The demo model is missing at '{path}': get the repository again.")
    config, weights = _config(DEMO), load_file(path)
    unet = UNet2DConditionModel.from_config(config["unet/config.json"])
    unet.load_state_dict(convert_ldm_unet_checkpoint(weights, unet.config))
    text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder/config.json"]))
    text_encoder.load_state_dict(_clip_weights(weights, text_encoder))
    vae = AutoencoderTiny(scaling_factor=SD_SCALE / float(weights["first_stage_model.vae_scale"]))
    vae.load_state_dict(_taesd_weights(weights))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler.from_config(config["scheduler/scheduler_config.json"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline if dtype == torch.float32 else pipeline.to(dtype)


def _clip_weights(weights: Weights, text_encoder: CLIPTextModel) -> Weights:
    prefix = "cond_stage_model.transformer."
    clip = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not any(key.startswith("text_model.") for key in text_encoder.state_dict()):
        clip = {key.removeprefix("text_model."): value for key, value in clip.items()}
    return clip


def _taesd_weights(weights: Weights) -> Weights:
    """diffusers does not count the clamp that TAESD's decoder starts with."""
    taesd = {}
    for key, value in weights.items():
        for part, shift in (("encoder", 0), ("decoder", 1)):
            prefix = f"first_stage_model.taesd_{part}."
            if key.startswith(prefix):
                index, _, rest = key.removeprefix(prefix).partition(".")
                taesd[f"{part}.layers.{int(index) - shift}.{rest}"] = value
    return taesd
