"""ComfyUI as a host of models of no known family: any that predicts from text.

Everything comes from the loaded model: its layers, its noise levels, the shape of its latents, and
its encoding of a prompt. ESD and Concept Ablation ask for no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor, nn

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...models.families import Family, layers_by_name
from ...models.interface import Text
from ...models.sampling import SigmaSchedule
from ...models.saved_tensors import copied_before_writing
from ...models.transformers import transformer_of
from ...models.unknown_family import UnknownFamily, family_of_model
from .denoiser import Denoiser
from .host import ComfyHost
from .model import ComfyModel, known_family

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

FLOWS = comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW
# Pixels a side for one of the latent, where that is not 8.
FACTORS = {"Flux2": 16, "Wan22": 16, "HunyuanImage21": 32, "ChromaRadiance": 1}
NO_GRADIENT = "no autograd formula"  # in torch's words
NO_PICTURES = "SC_Prior", "SC_B", "SD_X4", "ACEAudio"  # Stable Cascade, an upscaler, sound


def host_of(
    patcher: ModelPatcher, clip: CLIP | None = None, vae: VAE | None = None
) -> ComfyModel | UnknownModel:
    """``ComfyModel`` for the families we know, else ``UnknownModel``."""
    host = UnknownModel if known_family(patcher) is None else ComfyModel
    return host(patcher, clip, vae)


class UnknownModel(ComfyHost):
    """``fmn.models.interface.Model`` over any MODEL that predicts from text."""

    family: UnknownFamily

    def __init__(
        self, patcher: ModelPatcher, clip: CLIP | None = None, vae: VAE | None = None
    ) -> None:
        super().__init__(patcher, _family_of(patcher.model), clip, vae)
        if isinstance(patcher.get_model_object("model_sampling"), FLOWS):
            self.prediction = "flow"

    def key(self, name: str) -> str:
        if name not in layers_by_name(self.family):
            raise ForgetError(
                f"The patch changes '{name}', which this {self.family.title} does not have: use a "
                "patch made for this variant."
            )
        return super().key(name)

    def encode(self, prompt: Prompt) -> Text:
        """All that ComfyUI gives its sampler for the prompt, which stays alone in a forward."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        clip = self._need_clip()
        with torch.inference_mode():
            tokens = self._tokens(prompt)
            encoded = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        vectors = {name: _for_autograd(part) for name, part in encoded.items() if part is not None}
        vectors.pop("hooks", None)  # of LoRAs with a schedule
        return Text(vectors.pop("cond"), vectors, alone=True)

    @contextmanager
    def borrow_denoiser(self) -> Iterator[UnknownDenoiser]:
        """Load the model so that autograd can use it; see ``host``."""
        self._check_latents()
        # Many models add in place to tensors that backward needs; those are copied before.
        try:
            with self._loaded() as patcher, copied_before_writing():
                yield UnknownDenoiser(self.family, patcher)
        except RuntimeError as error:
            if NO_GRADIENT not in str(error):
                raise
            raise ForgetError(
                f"This ComfyUI computes {self.family.title} by functions without a gradient, so it "
                "cannot be trained on: use Re-read, which needs none and knows most transformers."
            ) from error

    @contextmanager
    def watch(self, batch: int = 1, side: int = 8) -> Iterator[WatchedModel]:
        """Load the model as for sampling a batch of latents of that side; see ``Watched``."""
        self._check_latents()
        self._load_for_sampling(batch, side)
        yield WatchedModel(self.family, self.patcher)

    def _check_latents(self) -> None:
        model = self.patcher.model
        latents, kind = model.latent_format, type(model.latent_format).__name__
        entry = getattr(self.family, "entry", None)
        # Of models whose latents have frames, those in the table draw pictures of one frame.
        flat = latents.latent_dimensions == 2 or (has_frames(model) and entry is not None)
        if not flat or kind in NO_PICTURES:
            raise ForgetError(
                f"{self.family.title} does not draw single pictures from noise ({kind} latents), "
                "which is all that can be trained: use a model that does."
            )
        noise = torch.zeros(1, latents.latent_channels, *(1,) * has_frames(model), 16, 16)
        if model.concat_cond(noise=noise, device=noise.device) is not None:
            raise ForgetError(
                f"This {self.family.title} reads a picture beside the noise (an inpainting or "
                "editing variant), which cannot be trained on yet: train on its base model and "
                "apply the patch here."
            )


class UnknownDenoiser(Denoiser):
    """A model by ComfyUI's noise levels; ``predict_noise`` gives d = (x - clean) / sigma.

    That is the noise in models that predict noise or v, and the velocity in flow models. x_t is
    the network's input, x divided by ``scales`` (ComfyUI's ``calculate_input``).
    """

    def __init__(self, family: Family, patcher: ModelPatcher) -> None:
        super().__init__(family, patcher)
        ones, sampling = torch.ones_like(self.sigmas), self.model.model_sampling
        self.scales = 1 / sampling.calculate_input(self.sigmas, ones)
        signals = sampling.noise_scaling(self.sigmas, torch.zeros_like(ones), ones)
        self.schedule = SigmaSchedule(self.sigmas, self.scales, signals)

    def _with_frames(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if has_frames(self.model) else x

    def _conditions(self, x: Tensor, text: Text) -> dict[str, Any]:
        # As comfy.samplers.encode_model_conds does.
        size = {"height": x.shape[-2] * 8, "width": x.shape[-1] * 8, "prompt_type": "positive"}
        inputs = {"cross_attn": text.context, "noise": x, "device": self.device}
        # Flux.2 and Chroma look for a pooled text although their text encoders give none.
        return {"pooled_output": None} | size | text.vectors | inputs

    def checkpoint_blocks(self) -> list[nn.Module]:
        """The members of the outermost module lists: a transformer's blocks."""
        return list(_blocks(self.model.diffusion_model))


class WatchedModel(UnknownDenoiser):
    """``fmn.models.interface.Watched``: weights stay where and as they are, in any precision."""

    def _reload(self) -> None:
        pass  # ComfyUI brings each weight to where it is needed

    def module(self, name: str) -> Any:
        return self.model.diffusion_model.get_submodule(layers_by_name(self.family)[name].compvis)

    def predict_each(self, x_t: Tensor, t: int, texts: Sequence[Text]) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        x = self._with_frames(x_t.to(self.device) * self.scales[t])
        sigma = self.sigmas[t]
        found = []
        with torch.inference_mode():
            inputs = [self._conds(x[i : i + 1], text) for i, text in enumerate(texts)]
            first = 0
            for last in range(1, len(inputs) + 1):
                if last < len(inputs) and _fit(inputs[first], inputs[last]):
                    continue
                part = x[first:last]
                joined = comfy.samplers.cond_cat(inputs[first:last])
                clean = self.model.apply_model(part, sigma.expand(len(part)), **joined)
                found.append((part - clean) / sigma)
                first = last
        return torch.cat(found).view_as(x_t)

    def _conds(self, x: Tensor, text: Text) -> dict[str, Any]:
        conds = self.model.extra_conds(**self._conditions(x, text))
        return {
            name: value.process_cond(batch_size=1, device=self.device, area=None)
            for name, value in conds.items()
        }


def has_frames(model: Any) -> bool:
    return model.latent_format.latent_dimensions == 3


def _fit(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether ComfyUI's sampler would put both prompts into one forward."""
    same = first.keys() == other.keys()
    return same and all(value.can_concat(other[name]) for name, value in first.items())


def _family_of(model: Any) -> UnknownFamily:
    network, latents = getattr(model, "diffusion_model", nn.Module()), model.latent_format
    modules = dict(network.named_modules())
    shapes = {path: module.weight.shape for path, module in modules.items() if _is_layer(module)}
    return family_of_model(
        type(model).__name__,
        shapes,
        latent_channels=latents.latent_channels,
        latent_factor=FACTORS.get(type(latents).__name__, 8),
        # The demo transformer has one. (ComfyUI's configurations answer None for what they lack.)
        resolution=getattr(type(model.model_config), "resolution", 1024),
        entry=transformer_of(
            type(network).__name__, {*modules, *(name for name, _ in network.named_parameters())}
        ),
    )


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a layer that ``fmn.models.adapters`` can add to."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    # ComfyUI's quantised layers are no subclass of Linear.
    return hasattr(module, "in_features") and getattr(module, "weight", None) is not None


def _for_autograd(value: Any) -> Any:
    """A tensor that autograd accepts, in float32 if it is no mask; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.float().clone() if value.is_floating_point() else value.clone()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
