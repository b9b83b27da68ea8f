"""What ComfyUI's models of all families share: a MODEL with the CLIP and VAE that belong to it.

All patchers of one checkpoint share one model, so whatever training leaves behind would reach every
workflow. ``ComfyHost._loaded`` therefore clones the patcher with the user's LoRAs (they take part
in training; attention patches and wrappers in the MODEL's options do not), loads it whole, replaces
inference tensors, which autograd refuses, by equal ordinary ones, and freezes all weights. No
loaded weight is written to. Hooks, replaced forwards and gradient flags are undone in ``finally``,
after success, error and Cancel alike. Weights paged by ComfyUI 0.16 and later are copied first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor, nn

from ...concepts.concept import Prompt
from ...concepts.prompt_syntax import prompt_text
from ...errors import ForgetError
from ...models.adapters import LayerModule
from ...models.families import Family, Layer, layers, layers_by_name
from ...models.interface import Fingerprint, fingerprint
from ...patches.foreign_file import ForeignFile, Tensors
from ...patches.patch import ForgetPatch
from .denoiser import ALL_MEMORY
from .text_encoder import FLOATS, load_whole, trainable, unpaged

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

PREFIX = "diffusion_model."


class ComfyHost:
    """The part of ``fmn.models.interface.Model`` that is the same for all families."""

    def __init__(
        self,
        patcher: ModelPatcher,
        family: Family,
        clip: CLIP | None = None,
        vae: VAE | None = None,
    ) -> None:
        self.patcher, self.family, self.clip, self.vae = patcher, family, clip, vae
        sampling = patcher.get_model_object("model_sampling")
        v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        self.prediction = "v" if v else "epsilon"

    def key(self, name: str) -> str:
        """ComfyUI's key of a layer's weight."""
        return f"{PREFIX}{layers_by_name(self.family)[name].compvis}.weight"

    def fingerprint(self) -> Fingerprint:
        def weight_of(layer: Layer) -> Tensor:
            key = self.key(layer.name)
            # While a patched model is loaded, the unpatched weights are in its backup.
            backup = self.patcher.backup.get(key)
            return self._weight(layer) if backup is None else backup.weight

        return fingerprint(self.family, weight_of)

    def _weight(self, layer: Layer) -> Tensor:
        return comfy.utils.get_attr(self.patcher.model, self.key(layer.name))

    def _tokens(self, prompt: Prompt) -> dict[str, list]:
        if prompt.plain:  # its words carry no weights
            return self._need_clip().tokenize(prompt.text, disable_weights=True)
        return self._need_clip().tokenize(prompt_text(prompt.text))

    def _need_clip(self) -> CLIP:
        if self.clip is None:
            raise ForgetError(
                "The CLIP input is empty (the checkpoint may have no text encoder): "
                "connect the CLIP that belongs to the model."
            )
        return self.clip

    def _text_module(self, name: str) -> LayerModule:
        stage, path = self._need_clip().cond_stage_model, layers_by_name(self.family)[name].compvis
        try:
            return stage.get_submodule(path)
        except AttributeError as error:
            raise ForgetError(
                f"This CLIP has no layer {path}: connect the CLIP of the same checkpoint."
            ) from error

    @property
    def quantised(self) -> bool:
        return bool(self._quantised_layer(self.patcher.model))

    def _quantised_layer(self, model: nn.Module) -> str:
        """The first layer whose weight is no plain float, and what it is; else ""."""
        for layer in layers(self.family):
            weight = comfy.utils.get_attr(model, self.key(layer.name))
            is_plain = type(weight) in (Tensor, nn.Parameter)
            if weight.dtype not in FLOATS or not is_plain:
                # ComfyUI's quantised tensors say that they are what they stand for.
                kind = str(getattr(weight, "_qdata", weight).dtype).removeprefix("torch.")
                return f"{layer.compvis} is {kind}"
        return ""

    def check_trainable(self) -> None:
        """Refuse quantised weights."""
        self._check_precision(self.patcher.model)

    def _check_precision(self, model: nn.Module) -> None:
        if quantised := self._quantised_layer(model):
            raise ForgetError(
                f"The model's weights are quantised ({quantised}) and cannot be trained on: take a "
                "method that solves, such as Re-read or UCE, or train on the same model loaded in "
                "float16, bfloat16 or float32 (weight_dtype default), and apply the patch here."
            )

    def _load_for_sampling(self, batch: int, side: int) -> None:
        """As ComfyUI does before it draws ``batch`` latents of that side."""
        model = self.patcher.model
        shape = [batch, self.family.latent_channels, side, side]
        with torch.inference_mode():  # LoRAs on 8-bit weights need it
            comfy.model_management.load_models_gpu([self.patcher], model.memory_required(shape))

    @contextmanager
    def _loaded(self) -> Iterator[ModelPatcher]:
        """A clone of the patcher, wholly loaded, frozen and ready for autograd."""
        patcher = unpaged(self.patcher)
        self._check_precision(patcher.model)
        load_whole(patcher, ALL_MEMORY)
        with trainable(patcher.model), kernels_with_gradient():
            yield patcher

    def check_fits(self, patch: ForgetPatch) -> None:
        """Refuse a patch of another family, or whose U-Net layers have other shapes."""
        patch.check_family(self.family)
        patch.check_shapes(self._weight)

    def patched(self, patch: ForgetPatch, strength: float) -> ModelPatcher:
        """A clone of the MODEL with the patch on it; ComfyUI merges it when it loads the model."""
        self.check_fits(patch)
        clone = self.patcher.clone()
        _add_patch(clone, comfy.lora.model_lora_keys_unet(clone.model, {}), patch, strength, False)
        return clone

    def patched_clip(self, patch: ForgetPatch, strength: float) -> CLIP:
        """A clone of the CLIP with the patch's changes of the text encoder on it."""
        patch.check_family(self.family)
        clip = self._need_clip()
        patch.check_shapes(lambda layer: self._text_module(layer.name).weight, text=True)
        clone = clip.clone()
        names = comfy.lora.model_lora_keys_clip(clone.cond_stage_model, {})
        _add_patch(clone, names, patch, strength, True)
        return clone


def base_weights(model: ModelPatcher | None, clip: CLIP | None) -> ForeignFile:
    """The weights of a MODEL and a CLIP as if they lay in a file, without LoRAs on them."""
    tensors: dict[str, Tensor] = {}
    for patcher in (model, clip and clip.patcher):
        if patcher is not None:
            patcher = unpaged(patcher)
            # While a patched model is loaded, the unpatched weights are in its backup.
            first = {key: backup.weight for key, backup in patcher.backup.items()}
            tensors |= patcher.model.state_dict() | first
    return ForeignFile("the connected model", Tensors(tensors), {})


@contextmanager
def kernels_with_gradient() -> Iterator[None]:
    """Let newer versions of ComfyUI use no kernels without a backward, for a while."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def _add_patch(
    clone: ModelPatcher | CLIP,
    names: dict[str, Any],
    patch: ForgetPatch,
    strength: float,
    text: bool,
) -> None:
    """Add the patch's U-Net or text part to a clone of a patcher or a CLIP."""
    layers = [layer for layer in patch.layers if layer.is_text == text]
    tensors = patch.lora(torch.float32, layers)
    applied = clone.add_patches(comfy.lora.load_lora(tensors, names), strength)
    if len(applied) != len(layers):
        raise ForgetError(
            f"The model has only {len(applied)} of the patch's {len(layers)} layers: "
            "use a patch made for the model's family."
        )
