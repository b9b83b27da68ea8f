"""ComfyUI as a host of models that are none of the families we know: any that predicts from text.

Everything comes from the loaded model: its layers, its noise levels, the shape of its latents, and
what it makes of a prompt. Only the method ESD asks for no more than that.
"""

from contextlib import contextmanager

import comfy.model_management
import comfy.model_sampling
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ...errors import ForgetError
from ...models.interface import Text
from ...models.unknown_family import family_of_model
from .model import ComfyModel, Denoiser, known_family, plain

FLOWS = comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW
# Pixels a side for one of the latent, where that is not 8.
FACTORS = {"Flux2": 16, "HunyuanImage21": 32, "ChromaRadiance": 1}
NO_PICTURES = "SC_Prior", "SC_B", "SD_X4", "ACEAudio"  # Stable Cascade, an upscaler, sound


def host_of(patcher, clip=None, vae=None):
    """``ComfyModel`` for the families we know, else ``UnknownModel``."""
    host = UnknownModel if known_family(patcher) is None else ComfyModel
    return host(patcher, clip, vae)


class UnknownModel(ComfyModel):
    """What ESD needs of ``fmn.models.interface.Model``, over any MODEL that predicts from text."""

    def __init__(self, patcher, clip=None, vae=None):
        super().__init__(patcher, clip, vae)
        if isinstance(patcher.get_model_object("model_sampling"), FLOWS):
            self.prediction = "flow"

    def _identify(self):
        model = self.patcher.model
        modules = getattr(model, "diffusion_model", torch.nn.Module()).named_modules()
        shapes = {path: module.weight.shape for path, module in modules if _is_layer(module)}
        latents = model.latent_format
        factor = FACTORS.get(type(latents).__name__, 8)
        return family_of_model(type(model).__name__, shapes, latents.latent_channels, factor)

    def key(self, name):
        if name not in self._compvis:
            raise ForgetError(
                f"The patch changes '{name}', which this {self.family.title} does not have: use a "
                "patch made for this variant."
            )
        return super().key(name)

    def encode(self, prompt):
        """The prompt as ComfyUI gives it to its sampler, all of it; it stays alone in a forward."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._need_clip()
        with torch.inference_mode():
            tokens = self.clip.tokenize(prompt.text, **plain(prompt))
            found = self.clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        found = {name: _ordinary(value) for name, value in found.items() if value is not None}
        found.pop("hooks", None)  # of LoRAs with a schedule
        return Text(found.pop("cond"), found, alone=True)

    @contextmanager
    def borrow_denoiser(self):
        """Load the model so that autograd can use it; see ``docs/architecture.md``."""
        self._check_latents()
        # Many models add in place to what backward needs; such a tensor is copied before.
        with self._loaded() as patcher, allow_mutation_on_saved_tensors():
            yield UnknownDenoiser(self, patcher)

    def _check_latents(self):
        model = self.patcher.model
        latents, kind = model.latent_format, type(model.latent_format).__name__
        if latents.latent_dimensions != 2 or kind in NO_PICTURES:
            raise ForgetError(
                f"{self.family.title} does not draw single pictures from noise ({kind} latents), "
                "which is all that can be trained: use a model that does."
            )
        noise = torch.zeros(1, latents.latent_channels, 16, 16)
        if model.concat_cond(noise=noise, device=noise.device) is not None:
            raise ForgetError(
                f"This {self.family.title} reads a picture beside the noise (an inpainting or "
                "editing variant), which cannot be trained on yet: train on its base model and "
                "apply the patch here."
            )


class UnknownDenoiser(Denoiser):
    """A model by ComfyUI's own noise levels; ``denoise`` gives d = (x - clean) / sigma.

    That is the noise in models that predict noise or v, and the velocity in flow models. x_t is
    what the network sees, x by ``scales`` (ComfyUI's ``calculate_input``).
    """

    def __init__(self, host, patcher):
        super().__init__(host, patcher)
        ones, sampling = torch.ones_like(self.sigmas), self.model.model_sampling
        self.scales = 1 / sampling.calculate_input(self.sigmas, ones)
        self.alphas_cumprod = None

    def _path(self, name):
        return self.host._compvis[name]

    def _conditions(self, x, text):
        # As comfy.samplers.encode_model_conds does.
        given = {"height": x.shape[2] * 8, "width": x.shape[3] * 8, "prompt_type": "positive"}
        given |= text.vectors | {"cross_attn": text.context, "noise": x, "device": self.device}
        return self._made(x, given)

    def checkpoint_blocks(self):
        """The members of the outermost module lists: a transformer's blocks."""
        return list(_blocks(self.model.diffusion_model))


def _is_layer(module):
    """Whether it is a layer that ``fmn.models.adapters`` can add to."""
    if isinstance(module, torch.nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    # ComfyUI's quantised layers are no subclass of Linear.
    return hasattr(module, "in_features") and getattr(module, "weight", None) is not None


def _ordinary(value):
    """A tensor that autograd accepts, in float32 if it is no mask; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.float().clone() if value.is_floating_point() else value.clone()


def _blocks(module):
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
