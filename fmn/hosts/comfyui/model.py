"""ComfyUI as a host, for the families we know; ``unknown_model`` adds all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...images import square
from ...models.adapters import LayerModule
from ...models.clip_text_encoder import in_batches, refuse_words
from ...models.families import UNetFamily, check_input_channels, identify_unet
from ...models.interface import Text, TextEncoder
from ...models.sampling import DRAWN_AT_ONCE
from ...models.token_positions import CHUNK
from .denoiser import UNet, WatchedUNet
from .host import ComfyHost
from .text_encoder import borrow_text_encoder, shortened, tokens_of, unpaged_clip

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

PREFIX = "diffusion_model."
TOKENIZERS = "l", "h"  # CLIP-L (also first of SDXL's two), OpenCLIP-H


class ComfyModel(ComfyHost):
    """``fmn.models.interface.UNetModel`` over a MODEL; CLIP and VAE only where they are needed."""

    family: UNetFamily

    def __init__(
        self, patcher: ModelPatcher, clip: CLIP | None = None, vae: VAE | None = None
    ) -> None:
        family = known_family(patcher)
        if family is None:
            raise ForgetError(
                f"{type(patcher.model).__name__} is an unsupported model: use Stable Diffusion "
                "1.x, 2.x or XL here; on others, patches can be trained by the method ESD and "
                "applied."
            )
        super().__init__(patcher, family, clip, vae)

    def tokenize(self, prompt: Prompt) -> list[int | None]:
        parts = self._tokens(prompt)
        name = next((name for name in TOKENIZERS if name in parts), None)
        if name is None:
            raise self._wrong_clip(f"tokens for {', '.join(parts)}")
        ids = [token for chunk in parts[name] for token, *_ in chunk]
        return [int(token) if isinstance(token, int) else None for token in ids]

    def encode(self, prompt: Prompt) -> Text:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with torch.inference_mode():
            tokens = self._tokens(prompt)
            context, pooled = self._need_clip().encode_from_tokens(tokens, return_pooled=True)
        self._check_context(context, CHUNK)
        vectors = {} if self.family.vector_dim is None else {"pooled": pooled.float().clone()}
        return Text(context.float().clone(), vectors)

    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> Tensor:
        clip, contexts = self._need_clip(), []
        for batch in in_batches(texts, length):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # ComfyUI encodes the chunks of a long prompt as one batch, each by itself.
            tokens: dict[str, list] = {}
            for text in batch:
                for name, chunks in tokens_of(clip, text).items():
                    tokens[name] = tokens.get(name, []) + chunks
            with torch.inference_mode(), shortened(clip.cond_stage_model, length):
                context = clip.encode_from_tokens(tokens)
            self._check_context(context, length)
            contexts.append(context.float().clone().unflatten(1, (-1, length))[0])
        return torch.cat(contexts)

    def text_module(self, name: str) -> LayerModule:
        self.clip = unpaged_clip(self._need_clip())  # from now on the hooked modules encode
        return self._text_module(name)

    def _need_vae(self, purpose: str) -> VAE:
        if self.vae is None:
            raise ForgetError(
                f"{purpose}, but the VAE input is empty: connect the checkpoint's VAE."
            )
        return self.vae

    def _check_context(self, context: Tensor, multiple: int) -> None:
        if context.shape[-1] != self.family.context_dim or context.shape[1] % multiple:
            raise self._wrong_clip(f"text of width {context.shape[-1]}")

    def _wrong_clip(self, gives: str) -> ForgetError:
        return ForgetError(
            f"This CLIP gives {gives}, but {self.family.title} reads text of width "
            f"{self.family.context_dim}: connect the CLIP of the same checkpoint."
        )

    def sample(
        self, prompt: Prompt, seeds: Iterable[int], size: int, steps: int, guidance: float
    ) -> Tensor:
        self.check_trainable()  # before drawing: they are to train on
        seeds = list(seeds)
        with torch.inference_mode():
            empty = torch.zeros(1, 4, size // 8, size // 8)
            noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
            texts = self._conditioning(prompt), self._conditioning(prompt._replace(text=""))
            latents = [
                comfy.sample.sample(
                    self.patcher, part, steps, guidance, "euler", "normal", *texts,
                    torch.zeros_like(part), seed=seeds[0],
                )
                for part in noise.split(DRAWN_AT_ONCE)
            ]  # fmt: skip
        return self.patcher.model.process_latent_in(torch.cat(latents)).float().cpu()

    def _conditioning(self, prompt: Prompt) -> list:
        return self._need_clip().encode_from_tokens_scheduled(self._tokens(prompt))

    def encode_images(self, images: Tensor, size: int) -> Tensor:
        vae = self._need_vae("A concept has reference pictures")
        with torch.inference_mode():
            latents = vae.encode(square(images, size).movedim(1, -1))
        return self.patcher.model.process_latent_in(latents.clone()).float().cpu()

    def decode(self, latents: Tensor) -> Tensor:
        vae = self._need_vae("Pictures are to be drawn")
        if vae.latent_channels != latents.shape[1]:
            raise ForgetError(
                f"This VAE reads {vae.latent_channels} channels, but {self.family.title} has "
                f"{latents.shape[1]}: use the VAE of the same checkpoint."
            )
        with torch.inference_mode():
            pictures = vae.decode(self.patcher.model.process_latent_out(latents.clone()))
        return pictures[..., :3].float().cpu().clone().clamp(0, 1)

    @contextmanager
    def borrow_denoiser(self) -> Iterator[UNet]:
        """Load the U-Net so that autograd can use it; see ``host``."""
        self._check_channels()
        with self._loaded() as patcher:
            yield UNet(self.family, patcher)

    @contextmanager
    def watch(self, batch: int = 1, side: int = 8) -> Iterator[UNet]:
        """See ``interface.Model``. Only quantised weights are not loaded as for autograd."""
        if not self.quantised:
            with self.borrow_denoiser() as denoiser:
                yield denoiser
            return
        self._check_channels()
        self._load_for_sampling(batch, side)
        yield WatchedUNet(self.family, self.patcher)

    def _check_channels(self) -> None:
        channels = self.patcher.model.diffusion_model.in_channels
        check_input_channels(channels)
        if channels != (given := 4 + self._channels_beside_noise()):
            raise ForgetError(
                f"This {self.family.title} reads {channels} channels, but ComfyUI gives it "
                f"{given}, as it knows no such variant of the family: train on its base model."
            )

    def _channels_beside_noise(self) -> int:
        x = torch.zeros(1, 4, 8, 8)
        beside = self.patcher.model.concat_cond(noise=x, latent_image=x, device=x.device)
        return 0 if beside is None else beside.shape[1]

    def borrow_text_encoder(self, words: bool = True) -> AbstractContextManager[TextEncoder]:
        """Load the text encoders so that autograd can use them."""
        clip = self._need_clip()
        if words:
            refuse_words(self.family)
        self.clip = unpaged_clip(clip)
        return borrow_text_encoder(self, self.clip)


def known_family(patcher: ModelPatcher) -> UNetFamily | None:
    """The family of ``families.FAMILIES`` that a MODEL is of, or None."""
    return identify_unet(getattr(patcher.model, "diffusion_model", None))
