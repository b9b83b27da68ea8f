"""Make a diffusers pipeline from the demo model, a single checkpoint file, or a folder.

Nothing is fetched: the configurations and the tokenizer's merges of the families lie in
``fmn/assets``.
"""

import inspect
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from ...downloads import first_bytes
from ...errors import ForgetError, memory_ran_out
from ...files import DEMO_FOLDER
from ...models.families import Family, UNetFamily, identify_unet
from ...patches.checkpoint import checkpoint_family
from ...patches.file_kind import kind_of
from ...patches.foreign_file import ForeignFile, read_folder, read_foreign, read_parts
from ...patches.weight_names import find, unet_places
from .parts import VAES, Config, Source, make_text_encoder, make_unet, make_vae

# Class of pipeline, its parts, and configuration by file
Model = tuple[type[DiffusionPipeline], dict[str, Any], dict[str, Config]]
ASSETS = Path(__file__).parents[2] / "assets"
DEMO_FILE = DEMO_FOLDER / "fmn-demo.safetensors"
PARTS = "unet", "text_encoder", "text_encoder_2", "vae"
UNETS = ("UNet2DConditionModel",)
TEXTS = "text_encoder", "text_encoder_2"
EDM = {"edm_mean", "edm_vpred.sigma_max"}
PREDICTIONS = "epsilon", "v_prediction"
# Their names in metadata, under modelspec's key and ComfyUI's.
PREDICTION_NAMES = {
    "v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon",
}  # fmt: skip
PREDICTION_KEYS = "modelspec.prediction_type", "modelspec.predict_key"
ZEROS = "force_zeros_for_empty_prompt"  # of XL's pipelines
WORDS = 49408  # of CLIP's tokenizer
# Pipelines of models that read a picture, and so are saved as what they are.
KEPT = {
    f"StableDiffusion{xl}{kind}Pipeline"
    for xl in ("", "XL")
    for kind in ("Inpaint", "InstructPix2Pix")
}
UNSUPPORTED = (
    " is an unsupported model: Stable Diffusion 1.x, 2.x and XL are supported, and other models "
    "inside ComfyUI, transformers by Re-read, UCE and ESD, the rest by ESD."
)


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    vae: str | Path | None = None,
    prediction: str | None = None,
) -> DiffusionPipeline:
    """A pipeline for ``demo``, a checkpoint of a known family, or a diffusers folder.

    Args:
        vae: a file or folder whose VAE replaces the model's own, which may be missing.
        prediction: one of ``PREDICTIONS``; None takes what the model says.

    Raises:
        ForgetError: there is no such model, its family is unknown, or weights of it are missing.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = DEMO_FILE if str(path) == "demo" else Path(path)
    if not path.exists():
        raise ForgetError(
            f"There is no model '{path}': give demo, demo-dit, a checkpoint such as a .safetensors "
            "file, or a diffusers folder."
        )
    try:
        make, parts, config = (_folder if path.is_dir() else _single_file)(path, dtype)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError) as error:
        if memory_ran_out(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ForgetError(
            f"'{path.name}' cannot be loaded ({type(error).__name__}: {reason:.120}): its "
            "configuration or weights are damaged; get it again."
        ) from error
    if vae is not None:
        parts["vae"] = _other_vae(Path(vae), config, dtype)
    if prediction:
        scheduler: Any = parts["scheduler"]
        kind = {"prediction_type": prediction}
        parts["scheduler"] = type(scheduler).from_config(scheduler.config, **kind)
    return _pipeline(make, parts)


def _pipeline(make: type[DiffusionPipeline], parts: dict[str, Any]) -> DiffusionPipeline:
    """A pipeline of those parts that it takes; optional ones that are not given are None."""
    named = inspect.signature(make.__init__).parameters
    given: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    given |= {"requires_safety_checker": False} | parts
    return make(**{name: part for name, part in given.items() if name in named})


def _plain(xl: bool) -> type[DiffusionPipeline]:
    return StableDiffusionXLPipeline if xl else StableDiffusionPipeline


def text_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, or one of the same parts that draws from text alone."""
    make = _plain(hasattr(pipeline, "text_encoder_2"))
    if isinstance(pipeline, make):
        return pipeline
    drawing = _pipeline(make, pipeline.components | {ZEROS: pipeline.config.get(ZEROS, True)})
    drawing.set_progress_bar_config(disable=True)
    return drawing


def _single_file(path: Path, dtype: torch.dtype) -> Model:
    file = read_foreign(path)
    family = checkpoint_family(file)
    config, source = _config(family), Source(file.name, file.tensors, dtype)
    first = find(file.tensors, unet_places("conv_in.weight", "input_blocks.0.0.weight"))
    if first:
        config["unet/config.json"]["in_channels"] = file.shape(first[0])[1]
    config["scheduler/scheduler_config.json"] |= _prediction(file, family)
    parts = {
        "scheduler": _scheduler(path, config["scheduler/scheduler_config.json"]),
        "unet": make_unet(source, config["unet/config.json"], family),
        "vae": make_vae(file, config.get("vae/config.json"), dtype),
    }
    for name, title, text in zip(TEXTS, _titles(family), family.texts):
        encoder = config[f"{name}/config.json"]
        parts[name] = make_text_encoder(source, encoder, text.comfy, title)
        parts[name.replace("text_encoder", "tokenizer")] = make_tokenizer(_padding(family, name))
    source.check_used()
    return _plain(len(family.texts) > 1), parts, config


def _folder(path: Path, dtype: torch.dtype) -> Model:
    index = _json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    kind = str(index.get("_class_name", "StableDiffusionPipeline"))
    if not (path / "unet").is_dir():
        raise _no_unet(path, kind)
    there = [name for name in PARTS if (path / name).is_dir()]
    config = {f"{name}/config.json": _part_config(path / name, name) for name in there}
    file = read_folder(path, PARTS)
    source = Source(str(path), file.tensors, dtype)
    unet = make_unet(source, config["unet/config.json"], None)
    family = identify_unet(unet)
    if family is None:
        raise ForgetError(kind + UNSUPPORTED)
    parts: dict[str, Any] = {
        "unet": unet,
        ZEROS: index.get(ZEROS, True),
        "scheduler": _folder_scheduler(path, family),
        "vae": make_vae(file, config.get("vae/config.json"), dtype),
    }
    for name, title, text in zip(TEXTS, _titles(family), family.texts):
        if f"{name}/config.json" not in config:
            raise ForgetError(f"'{path}' lacks the {title}, a folder {name}: get it again.")
        parts[name] = make_text_encoder(source, config[f"{name}/config.json"], text.comfy, title)
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[tokenizer] = _folder_tokenizer(path / tokenizer, _padding(family, name))
    source.check_used()
    make = getattr(diffusers, kind) if kind in KEPT else _plain(len(family.texts) > 1)
    return make, parts, _config(family) | config


def _titles(family: Family) -> Sequence[str]:
    pair = "first text encoder", "second text encoder"
    return pair if len(family.texts) > 1 else ("text encoder",)


def _no_unet(path: Path, kind: str) -> ForgetError:
    if (path / "transformer").is_dir():
        return ForgetError(kind + UNSUPPORTED)
    if (path / "config.json").is_file():
        return ForgetError(
            f"'{path}' is one part of a diffusers folder: give the folder around it, with unet and "
            "text_encoder in it."
        )
    return ForgetError(
        f"'{path}' is no diffusers folder, as it has no folder unet: give one, or a checkpoint "
        "such as a .safetensors file."
    )


def _json(path: Path) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
        ForgetError: it is missing, or no such file.
    """
    try:
        first_bytes(path)
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ForgetError(f"'{path}' cannot be read ({error.strerror}): get it again.") from error
    except ValueError as error:
        raise ForgetError(f"'{path}' is damaged ({error!s:.60}): get it again.") from error
    if not isinstance(content, dict):
        raise ForgetError(f"'{path}' holds no settings by name: get it again.")
    return content


def _part_config(folder: Path, part: str) -> Config:
    config = _json(folder / "config.json")
    if "quantization_config" in config:
        raise ForgetError(
            f"'{folder}' holds quantised weights, which cannot be trained on: use the same model "
            "in float16, bfloat16 or float32."
        )
    known, kind = {"unet": UNETS, "vae": VAES}.get(part), config.get("_class_name")
    if known and kind not in known:
        raise ForgetError(
            f"'{folder}' is a {kind!s:.60}, and only {' and '.join(known)} can be used: use a "
            "model of Stable Diffusion 1.x, 2.x or XL."
        )
    return config


def _scheduler(path: Path, config: Config) -> SchedulerMixin:
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ForgetError(
            f"'{path}' names the scheduler {config.get('_class_name')!s:.60}, which diffusers does "
            "not have: write EulerDiscreteScheduler into its scheduler_config.json."
        )
    return kind.from_config(config)


def _folder_scheduler(path: Path, family: Family) -> SchedulerMixin:
    own = path / "scheduler" / "scheduler_config.json"
    if own.exists():
        return _scheduler(path, _json(own))
    return _scheduler(path, _config(family)["scheduler/scheduler_config.json"])


def _folder_tokenizer(folder: Path, padding: str) -> CLIPTokenizer:
    """A folder's tokenizer, or CLIP's where it is missing or lacks files."""
    if (folder / "tokenizer.json").is_file():
        _json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _json(folder / "vocab.json")
    else:
        return make_tokenizer(padding)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) >= WORDS:
        return tokenizer
    logging.getLogger(__name__).warning(
        "'%s' knows %d words of %d: CLIP's own tokenizer is used.", folder, len(tokenizer), WORDS
    )
    return make_tokenizer(padding)


def _other_vae(path: Path, config: dict[str, Config], dtype: torch.dtype) -> torch.nn.Module:
    """The VAE of a file, a diffusers folder, or the folder ``vae`` of one."""
    given: Config | None
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        file, given = read_parts(str(path), {"": folder}), _part_config(folder, "vae")
    else:
        file, given = read_foreign(path), config.get("vae/config.json")
    vae = make_vae(file, given, dtype)
    if vae is None:
        kind = kind_of(file.tensors) or "no known file"
        raise ForgetError(f"'{path}' is {kind}, not a VAE: give --vae a VAE's file or folder.")
    return vae


def _config(family: Family) -> dict[str, Config]:
    return json.loads((ASSETS / "pipelines.json").read_text("utf-8"))[family.key]


def _padding(family: Family, encoder: str) -> str:
    return "!" if family.key == "sd2" or encoder == "text_encoder_2" else "<|endoftext|>"


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


def _prediction(file: ForeignFile, family: UNetFamily) -> Config:
    """The scheduler's settings for a checkpoint: by keys, as ComfyUI knows them, or by metadata.

    XL checkpoints carry keys for it. In Stable Diffusion 2.x the last block's norm shows it: its
    bias spreads wider in the 768 px model, which has no variants with more inputs.
    """
    keys = file.tensors.keys()
    if EDM & keys:
        raise ForgetError(
            f"'{file.name}' was trained on EDM's noise levels, as CosXL and Playground 2.5 "
            "are, which only ComfyUI supports: train on it inside ComfyUI."
        )
    named = (PREDICTION_NAMES.get(file.metadata.get(key, "")) for key in PREDICTION_KEYS)
    kind = next(filter(None, named), None)
    if "v_pred" in keys or (kind is None and family.key == "sd2" and _has_sd2_mark(file)):
        kind = "v_prediction"
    zero_snr = kind == "v_prediction" and "ztsnr" in keys
    return {"prediction_type": kind or "epsilon", "rescale_betas_zero_snr": zero_snr}


def _has_sd2_mark(file: ForeignFile) -> bool:
    norm = "transformer_blocks.0.norm1.bias"
    place = find(
        file.tensors, unet_places(f"up_blocks.3.attentions.2.{norm}", f"output_blocks.11.1.{norm}")
    )
    first = find(file.tensors, unet_places("conv_in.weight", "input_blocks.0.0.weight"))
    if not place or not first or file.shape(first[0])[1] != 4:
        return False
    return float(file.tensors[place[0]].float().std(unbiased=False)) > 0.09
