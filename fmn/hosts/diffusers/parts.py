"""The parts of a pipeline, made from their configuration and the weights of a file.

Every weight comes from the file: one that is missing, of another shape, or unknown is named and
refused, where diffusers would leave a missing one at random and drop an unknown one.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ...errors import ForgetError
from ...models.families import UNetFamily
from ...patches.foreign_file import ForeignFile
from ...patches.weight_names import (
    Place,
    compvis_modules,
    find,
    take,
    text_places,
    unet_places,
)

Config = dict[str, Any]
TEXT_MODELS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
VAES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}
# TAESD works on latents of unit variance times 0.18215; a checkpoint's own factor replaces it.
SD_SCALE = 0.18215
# Tensors that carry nothing for drawing: buffers, the parts of CLIP that see, EMA copies, settings
# of samplers, and the VAE, which is read by itself.
UNUSED = re.compile(
    r"position_ids|logit_scale|text_projection|vision_model|visual|first_stage_model\.|^vae\.|"
    r"model_ema|alphas_cumprod|^(v_pred|ztsnr|edm_|betas|sqrt_|log_one|"
    r"posterior_|logvar|lvlb|denoiser|global_step|epoch|scale_factor)"
)
# The attention of VAEs that older versions of diffusers saved.
OLD_NAMES = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.\w+$)")
NEW_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
REMEDY = "use a whole checkpoint, with U-Net, text encoder and VAE"


class Source:
    """The weights of a file or folder, and which of them were used."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """``dtype`` is what weights are cast to."""
        self.name, self.tensors, self.dtype = name, tensors, dtype
        self.used: set[str] = set()

    def fill(self, module: nn.Module, part: str, of: Callable[[str], Iterator[Place]]) -> None:
        """Give a module on the meta device its weights.

        Args:
            part: what the module is, for messages.
            of: function from the name of a weight to where it may be.

        Raises:
            ForgetError: weights are missing or have other shapes.
        """
        expected = module.state_dict()
        found = {name: find(self.tensors, of(name)) for name in expected}
        places = {name: place for name, place in found.items() if place}
        missing = [name for name in found if name not in places]
        if len(missing) == len(found):
            raise ForgetError(f"'{self.name}' lacks the {part}: {REMEDY}.")
        if missing:
            example = self._key_like(places, of, missing[0])
            raise ForgetError(
                f"'{self.name}' lacks {len(missing)} of the {part}'s {len(found)} weights, such as "
                f"'{example:.90}': get it again, or {REMEDY}."
            )
        weights = {name: self._weight(p, expected[name].shape) for name, p in places.items()}
        self.used |= {key for key, _ in places.values()}
        module.load_state_dict(weights, assign=True)
        module.eval()

    @staticmethod
    def _key_like(
        places: Mapping[str, Place], of: Callable[[str], Iterator[Place]], missing: str
    ) -> str:
        """What a missing weight would be called in this file, by the names of the others."""
        name, place = next(iter(places.items()))
        return list(of(missing))[list(of(name)).index(place)][0]

    def _weight(self, place: Place, shape: torch.Size) -> Tensor:
        tensor = take(self.tensors, place)
        # A 1x1 convolution and a Linear stand for each other.
        if tensor.squeeze().shape != torch.empty(shape, device="meta").squeeze().shape:
            raise ForgetError(
                f"'{self.name}' holds '{place[0]:.90}' of shape {list(tensor.shape)}, and "
                f"{list(shape)} was expected: it is for another kind of model."
            )
        return tensor.reshape(shape).to(self.dtype)

    def check_used(self) -> None:
        """Refuse unknown weights among those of the model's parts; name others in the log."""
        left = [key for key in self.tensors if key not in self.used and not UNUSED.search(key)]
        starts = {key.partition(".")[0] for key in self.used}
        inside = [key for key in left if key.partition(".")[0] in starts]
        if inside:
            raise ForgetError(
                f"'{self.name}' holds weights that its kind of model does not have, {len(inside)} "
                f"such as '{inside[0]:.90}': it is another variant; use its base model."
            )
        if left:
            logging.getLogger(__name__).warning(
                "'%s' also holds %d weights that belong to no part of the model, such as '%.90s': "
                "they are left out.", self.name, len(left), left[0],
            )  # fmt: skip


def make_unet(source: Source, config: Config, family: UNetFamily | None) -> UNet2DConditionModel:
    """The U-Net; CompVis' names are known for those of a ``family``."""
    modules = compvis_modules(family) if family else {}

    def of(name: str) -> Iterator[Place]:
        module, _, kind = name.rpartition(".")
        return unet_places(name, f"{modules[module]}.{kind}" if module in modules else None)

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    source.fill(unet, "U-Net", of)
    return unet


def make_text_encoder(source: Source, config: Config, comfy: str, part: str) -> nn.Module:
    """A CLIP text encoder.

    Args:
        comfy: ComfyUI's name of it, such as "clip_l".
        part: what it is, for messages.
    """
    kind = next(iter(config.get("architectures") or ["CLIPTextModel"]))
    if kind not in TEXT_MODELS:
        raise ForgetError(
            f"'{source.name}' has the text encoder {kind!s:.40}, and only CLIP's are supported: "
            "use a model of Stable Diffusion 1.x, 2.x or XL."
        )
    with torch.device("meta"):
        encoder = TEXT_MODELS[kind](CLIPTextConfig.from_dict(config))

    def of(name: str) -> Iterator[Place]:
        plain = name.startswith(("text_model.", "text_projection."))
        return text_places(comfy, name if plain else f"text_model.{name}")

    source.fill(encoder, part, of)
    if comfy == "clip_h":  # OpenCLIP's has one block more, whose output is never used
        spare = re.compile(rf"\.(resblocks|layers)\.{encoder.config.num_hidden_layers}\.")
        source.used |= set(filter(spare.search, source.tensors))
    embeddings = next(module for module in encoder.modules() if hasattr(module, "position_ids"))
    embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return encoder


def make_vae(file: ForeignFile, config: Config | None, dtype: torch.dtype) -> nn.Module | None:
    """The autoencoder of a checkpoint, a folder, or a file of its own; None if there is none.

    Args:
        config: of the autoencoder; a tiny one in a single file needs none.

    Raises:
        ForgetError: weights are missing, or it is for another family.
    """
    found = (re.match(r"(|vae\.|first_stage_model\.)(taesd_)?decoder\.", k) for k in file.tensors)
    if (match := next(filter(None, found), None)) is None:
        return None
    prefix, taesd = match.groups()
    keys = [key for key in file.tensors if key.startswith(prefix)]
    weights = {key.removeprefix(prefix): file.tensors[key] for key in keys}
    if taesd:
        if "vae_scale" not in weights:
            raise ForgetError(f"'{file.name}' lacks the VAE's weight 'vae_scale': get it again.")
        scale = SD_SCALE / float(weights["vae_scale"])
        config = {"_class_name": "AutoencoderTiny", "scaling_factor": scale}
        weights = _taesd_weights(weights)
    if config is None:
        raise ForgetError(f"'{file.name}' has no VAE for the demo model: leave --vae out.")
    kind = VAES[config["_class_name"]]
    named = inspect.signature(kind.__init__).parameters  # a tiny one saves more than it takes
    with torch.device("meta"):
        vae = kind.from_config({name: value for name, value in config.items() if name in named})
    if any(key.startswith("decoder.mid.") for key in weights):
        weights = convert_ldm_vae_checkpoint(weights, vae.config)
    weights = {OLD_NAMES.sub(lambda m: NEW_NAMES[m[0]], k): w for k, w in weights.items()}
    Source(file.name, weights, dtype).fill(vae, "VAE", lambda name: iter([(name, None)]))
    return vae


def _taesd_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers does not count the clamp that TAESD's decoder starts with."""
    taesd = {}
    for key, value in weights.items():
        part, _, rest = key.removeprefix("taesd_").partition(".")
        index, _, rest = rest.partition(".")
        if index.isdigit():
            taesd[f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"] = value
    return taesd
