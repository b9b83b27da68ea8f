"""ComfyUI's networks while a method works with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor, nn

from ...models.adapters import LayerModule
from ...models.families import Family, cross_attention_names, layers_by_name
from ...models.interface import Text
from ...models.sampling import DDPMSchedule
from .text_encoder import reload_if_moved

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ALL_MEMORY = 1e20  # bytes beside the network: no other model stays


class Denoiser:
    """``fmn.models.interface.Denoiser`` over a loaded patcher.

    Attributes:
        sigmas: noise level of each time step [S]; ComfyUI's x is the clean latent plus sigma
            times noise.
        scales: x / x_t of each time step [S].
    """

    scales: Tensor

    def __init__(self, family: Family, patcher: ModelPatcher) -> None:
        self.family, self.patcher, self.model = family, patcher, patcher.model
        self.device = self.model.device
        # ComfyUI may leave a replaced model_sampling on the CPU.
        self.sigmas = self.model.model_sampling.sigmas.to(self.device).clone()

    def module(self, name: str) -> LayerModule:
        return self._submodule(layers_by_name(self.family)[name].compvis)

    def _submodule(self, path: str) -> Any:
        # Its weight may be read, which lacks the user's LoRAs while it is away.
        self._reload()
        return self.model.diffusion_model.get_submodule(path)

    def _reload(self) -> None:
        # The VAE or the text encoder may have needed the memory.
        reload_if_moved(self.patcher, self.device, ALL_MEMORY)

    def predict_noise(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """d = (x - clean) / sigma."""
        # A step of a method may draw for a while first.
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._reload()
        t = t.to(self.device)
        sigma = self.sigmas[t]
        x = self._with_frames(x_t.to(self.device) * self.scales[t].view(-1, 1, 1, 1))
        options = {"optimized_attention_override": _fused_attention}
        conditions = self._model_inputs(x, self._conditions(x, text))
        clean = self.model.apply_model(x, sigma, transformer_options=options, **conditions)
        return (x - clean).view_as(x_t) / sigma.view(-1, 1, 1, 1)

    def _with_frames(self, x: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the network reads them."""
        return x

    def _conditions(self, x: Tensor, text: Text) -> dict[str, Any]:
        """What ComfyUI's sampler gives the model beside x."""
        raise NotImplementedError

    def _model_inputs(self, x: Tensor, conditions: dict[str, Any]) -> dict[str, Any]:
        inputs = self.model.extra_conds(**conditions)
        return {
            name: value.process_cond(batch_size=len(x), device=self.device, area=None).cond
            for name, value in inputs.items()
        }


class UNet(Denoiser):
    """``fmn.models.interface.UNet`` over a loaded patcher."""

    context_argument = "context"

    def __init__(self, family: Family, patcher: ModelPatcher) -> None:
        super().__init__(family, patcher)
        self.scales = (1 + self.sigmas**2).sqrt()  # x_t has unit variance
        self.alphas_cumprod = 1 / (1 + self.sigmas.float() ** 2)
        self.schedule = DDPMSchedule(self.alphas_cumprod)

    def weight(self, name: str) -> Tensor:
        return self.module(name).weight.detach()

    def cross_attention_modules(self) -> list[nn.Module]:
        queries = [f"{name}.to_q" for name in cross_attention_names(self.family)]
        paths = [layers_by_name(self.family)[query].compvis for query in queries]
        return [self._submodule(path.removesuffix(".to_q")) for path in paths]

    def _conditions(self, x: Tensor, text: Text) -> dict[str, Any]:
        conditions = {"cross_attn": text.context.to(self.device), "noise": x, "device": self.device}
        # Without a mask, inpainting models get an empty picture to fill, whatever this one shows.
        conditions["latent_image"] = x
        if "pooled" in text.vectors:
            height, width = x.shape[-2] * 8, x.shape[-1] * 8
            pooled = text.vectors["pooled"]
            conditions |= {"pooled_output": pooled, "height": height, "width": width}
        return conditions

    def checkpoint_blocks(self) -> list[nn.Module]:
        names = "ResBlock", "BasicTransformerBlock"
        return [m for m in self.model.diffusion_model.modules() if type(m).__name__ in names]


class WatchedUNet(UNet):
    """A U-Net with weights of any precision, which stay where and as they are."""

    def _reload(self) -> None:
        pass  # ComfyUI brings each weight to where it is needed

    def predict_noise(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        with torch.inference_mode():  # as ComfyUI does; quantised layers know no other
            noise = super().predict_noise(x_t, t, text)
        return noise.clone()

    def weight(self, name: str) -> Tensor:
        """What the layer gives for unit vectors, less its bias, whatever its weight is kept as."""
        module: Any = self.module(name)
        rows = torch.eye(module.weight.shape[1], device=self.device)
        with torch.inference_mode():
            columns = module(rows[None])[0] - module(torch.zeros_like(rows[None, :1]))[0]
        return columns.mT.clone()


def _fused_attention(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """Self-attention through PyTorch's kernel: ComfyUI's default on a CPU keeps far more."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
