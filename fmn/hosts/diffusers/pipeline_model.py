"""What the hosts over diffusers' classes share: noise, autoencoder, patches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...images import square
from ...models.adapters import LayerModule, Patch, check_fits
from ...models.families import Family
from ...models.interface import Fingerprint, fingerprint
from ...models.sampling import DRAWN_AT_ONCE, seeded_noise

if TYPE_CHECKING:
    from typing_extensions import Self

PIXELS_AT_ONCE = 1 << 20  # that the autoencoder makes or reads: one picture of XL's size

AnyFamily = TypeVar("AnyFamily", bound=Family)


def _pictures_at_once(height: int, width: int) -> int:
    return max(1, PIXELS_AT_ONCE // (height * width))


class PipelineModel(ABC, Generic[AnyFamily]):
    """A network with the text encoder and the autoencoder of a pipeline.

    Attributes:
        is_demo: one of the small models that come with this package.
    """

    family: AnyFamily
    pipeline: Any
    is_demo: bool

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def _module(self, name: str) -> LayerModule: ...

    @abstractmethod
    def sample_latents(
        self, prompts: Sequence[str | Prompt], noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Latents [N, 4, h, w] of unit variance from noise [N, 4, h, w]; strings are plain."""

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.family, lambda layer: self._module(layer.name).weight)

    def initial_noise(self, seeds: Iterable[int], size: int) -> Tensor:
        """``seeded_noise`` [N, 4, size/8, size/8] for pictures of ``size`` pixels a side."""
        return seeded_noise(seeds, size // 8)

    @torch.no_grad()
    def sample(
        self, prompt: Prompt, seeds: Iterable[int], size: int, steps: int, guidance: float
    ) -> Tensor:
        latents = [
            self.sample_latents([prompt] * len(noise), noise, steps, guidance).float().cpu()
            for noise in self.initial_noise(seeds, size).split(DRAWN_AT_ONCE)
        ]
        return torch.cat(latents)

    def need_vae(self) -> Any:
        """The VAE; few methods need one, so a model may lack it.

        Raises:
            ForgetError: it does.
        """
        if self.pipeline.vae is None:
            raise ForgetError(
                "Pictures are to be drawn or read, and the model has no VAE: give one with --vae "
                "FILE, or use a checkpoint with VAE."
            )
        return self.pipeline.vae

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae, pictures = self.need_vae(), []
        for part in latents.split(_pictures_at_once(latents.shape[2] * 8, latents.shape[3] * 8)):
            images = vae.decode(part.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
            pictures.append((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu())
        return torch.cat(pictures)

    @torch.no_grad()
    def encode_images(self, images: Tensor, size: int) -> Tensor:
        vae, latents = self.need_vae(), []
        for part in square(images, size).split(_pictures_at_once(size, size)):
            encoded = vae.encode(part.to(vae.device, vae.dtype) * 2 - 1)
            tiny = hasattr(encoded, "latents")
            mode = encoded.latents if tiny else encoded.latent_dist.mode()
            latents.append((mode * vae.config.scaling_factor).float().cpu())
        return torch.cat(latents)

    @torch.no_grad()
    def add_patches(self, patches: Sequence[tuple[Patch, float]]) -> Self:
        """Add patches to the weights for good, all or none; a list of (patch, strength).

        Raises:
            ForgetError: a patch does not fit the model, which is then unchanged.
        """
        for patch, _ in patches:
            check_fits(patch, self.family, self._module)
        for patch, strength in patches:
            for name in patch.changes:
                weight = self._module(name).weight
                weight += (strength * patch.change_of(name, weight.device)).to(weight.dtype)
        return self

    merged = add_patches  # deprecated: the name in version 0.1
