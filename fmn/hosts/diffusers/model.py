"""diffusers as a host: Stable Diffusion 1.x, 2.x, XL pipelines and the demo model."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn

from ...concepts.concept import Prompt
from ...concepts.prompt_syntax import unescaped
from ...errors import ForgetError
from ...models.adapters import LayerModule
from ...models.clip_text_encoder import check_one_chunk, in_batches
from ...models.families import (
    DEMO,
    UNetFamily,
    check_input_channels,
    cross_attention_names,
    identify_unet,
)
from ...models.interface import Text, TextEncoder
from ...models.module_patching import frozen
from ...models.sampling import DDPMSchedule
from ...models.token_positions import CHUNK
from .load import UNSUPPORTED, load_pipeline, text_to_image
from .pipeline_model import PipelineModel
from .text_encoder import (
    borrow_text_encoder,
    chunks_of,
    encode_prompts,
    evaluating,
    pieces_of,
    shortened,
)

EMPTY = Prompt("", "")

# Of an empty picture, the first moments of Stable Diffusion's latents, as ComfyUI has them.
EMPTY_PICTURE = 0.8223, -0.6876, 0.6364, 0.1380


def _filled(unet: UNet2DConditionModel) -> AbstractContextManager:
    """Lets a variant's U-Net take noise alone, for a while."""
    return nullcontext() if unet.config.in_channels == 4 else unet.register_forward_pre_hook(_fill)


def _fill(unet: UNet2DConditionModel, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Variants of a model read more than the noise: give them an empty picture, all to be filled.

    For instruct models these are zeros, for inpainting models a mask of ones and latents of grey.
    """
    x, missing = args[0], unet.config.in_channels - args[0].shape[1]
    extra = x.new_zeros(len(x), max(0, missing), *x.shape[2:])
    if missing == 5:
        extra[:, 0] = 1
        extra[:, 1:] = x.new_tensor(EMPTY_PICTURE).view(-1, 1, 1)
    return (torch.cat([x, extra], 1) if missing in (4, 5) else x, *args[1:])


def _prediction(scheduler: Any) -> str:
    kind = scheduler.config.get("prediction_type", "epsilon")
    known = {"epsilon": "epsilon", "v_prediction": "v"}
    if kind not in known or not hasattr(scheduler, "alphas_cumprod"):
        raise ForgetError(
            f"The pipeline's {type(scheduler).__name__} predicts '{kind}' by noise levels that are "
            "unsupported: only epsilon and v prediction by Stable Diffusion's are supported here. "
            "Train on it inside ComfyUI."
        )
    return known[kind]


class DiffusersModel(PipelineModel[UNetFamily]):
    """``fmn.models.interface.UNetModel`` over a pipeline; see ``load``."""

    quantised = False  # ``load`` refuses such files

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        unet = getattr(pipeline, "unet", None)
        family = identify_unet(unet)
        if unet is None or family is None:
            raise ForgetError(type(pipeline).__name__ + UNSUPPORTED)
        self.family, self.is_demo = family, family is DEMO
        self.saved, self.pipeline, self.unet = pipeline, text_to_image(pipeline), unet
        self.prediction = _prediction(pipeline.scheduler)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        vae: str | Path | None = None,
        prediction: str | None = None,
    ) -> DiffusersModel:
        """Load ``demo``, a checkpoint or a diffusers folder in float32; see ``load_pipeline``."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = load_pipeline(path, vae=vae, prediction=prediction).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def tokenize(self, prompt: Prompt) -> list[int]:
        chunks = chunks_of(self.pipeline.tokenizer, pieces_of(prompt))
        return [token for chunk in chunks for token, _ in chunk]

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Text:
        if text := self._short(prompt):
            return encode_prompts(self.pipeline, text, self.device)
        with borrow_text_encoder(self, self.pipeline, words=False) as encoder:
            return encoder.encode_pieces(pieces_of(prompt))

    def _short(self, prompt: Prompt) -> list[str]:
        """The text of a prompt of one chunk without weights, which the pipeline reads right."""
        pieces, short = pieces_of(prompt), len(self.tokenize(prompt)) == CHUNK
        return [pieces[0][0]] if short and len(pieces) == 1 and pieces[0][1] == 1 else []

    @torch.no_grad()
    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> Tensor:
        for text in texts:
            check_one_chunk(text, len(self.tokenize(Prompt(text, text))) // CHUNK)
        with shortened(self.pipeline, length):
            batches = [
                encode_prompts(self.pipeline, list(map(unescaped, batch)), self.device).context
                for batch in in_batches(texts, length)
            ]
        return torch.cat(batches).float()

    def text_module(self, name: str) -> LayerModule:
        part, _, path = name.partition(".")
        encoder = getattr(self.pipeline, part)
        # transformers 5 dropped the level text_model from the module, not from the file.
        known = hasattr(encoder, "text_model")
        return encoder.get_submodule(path if known else path.removeprefix("text_model."))

    @torch.no_grad()
    def sample_latents(
        self, prompts: Sequence[str | Prompt], noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        """Latents [N, 4, h, w] of unit variance from noise [N, 4, h, w]; strings are plain.

        The first sample is noise * sqrt(1 + sigma_max^2), as in ComfyUI; diffusers would scale it
        by sigma_max.
        """
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(steps)
        start = float(scheduler.init_noise_sigma)
        if start > 1:  # samples are not of unit variance: the schedulers of Karras et al.
            largest = float(scheduler.sigmas.max())
            noise = noise * ((1 + largest**2) ** 0.5 / start)
        with _filled(self.unet):
            return self.pipeline(
                **self._conditions([p if isinstance(p, Prompt) else Prompt(p, p) for p in prompts]),
                latents=noise.to(self.device, self.unet.dtype),
                height=noise.shape[-2] * 8,
                width=noise.shape[-1] * 8,
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images

    def _conditions(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The pipeline's arguments for prompts. By itself it would cut long ones."""
        if all(short := [self._short(prompt) for prompt in prompts]):
            return {"prompt": [text for texts in short for text in texts]}
        text = Text.cat([self.encode(prompt) for prompt in (*prompts, EMPTY)])
        zero = self.pipeline.config.get("force_zeros_for_empty_prompt", False)
        given = {"prompt_embeds": text.context} | {
            f"{name}_prompt_embeds": vector for name, vector in text.vectors.items()
        }
        return {name: rows[:-1] for name, rows in given.items()} | {
            f"negative_{name}": rows[-1:].repeat(len(prompts), *[1] * (rows.dim() - 1)) * (not zero)
            for name, rows in given.items()
        }

    @contextmanager
    def borrow_denoiser(self) -> Iterator[_UNet]:
        check_input_channels(self.unet.config.in_channels)
        with evaluating([self.unet]), frozen([self.unet]), _filled(self.unet):
            yield _UNet(self)

    def watch(self, batch: int = 1, side: int = 8) -> AbstractContextManager[_UNet]:
        return self.borrow_denoiser()

    def borrow_text_encoder(self, words: bool = True) -> AbstractContextManager[TextEncoder]:
        return borrow_text_encoder(self, self.pipeline, words)

    def _module(self, name: str) -> LayerModule:
        is_text = name.startswith("text_encoder")
        return self.text_module(name) if is_text else self.unet.get_submodule(name)

    def save(self, folder: str | Path) -> None:
        """Write the pipeline as a diffusers folder, whole or not at all."""
        folder = Path(folder)
        if folder.exists():
            raise ForgetError(f"'{folder}' exists already: name a new folder.")
        # A new name: files that are there already would become part of the model, or be removed.
        part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
        try:
            self.saved.save_pretrained(part)
            part.rename(folder)
        except (OSError, SafetensorError) as error:
            raise ForgetError(
                f"'{folder}' could not be written ({error}): free some space or choose another "
                "place."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


class _UNet:
    """``fmn.models.interface.UNet`` over a pipeline's."""

    context_argument = "encoder_hidden_states"

    def __init__(self, model: DiffusersModel) -> None:
        self.model, self.unet = model, model.unet
        self.device = model.device
        # Some schedulers for models of zero terminal SNR have 0 in it, by which nothing divides.
        self.alphas_cumprod = model.pipeline.scheduler.alphas_cumprod.float().clamp(min=2**-24)
        self.schedule = DDPMSchedule(self.alphas_cumprod)

    def module(self, name: str) -> LayerModule:
        return self.unet.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        return self.module(name).weight.detach()

    def cross_attention_modules(self) -> list[nn.Module]:
        return [self.unet.get_submodule(name) for name in cross_attention_names(self.model.family)]

    def predict_noise(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        dtype = self.unet.dtype
        x_t = x_t.to(self.device, dtype)
        output = self.unet(
            x_t,
            t.to(self.device),
            encoder_hidden_states=text.context.to(self.device, dtype),
            added_cond_kwargs=self._added_conditions(x_t, text),
        ).sample
        if self.model.prediction == "epsilon":
            return output
        # The noise of v = sqrt(alpha) noise - sqrt(1 - alpha) x_0 (Salimans & Ho 2022, appendix D)
        alpha = self.alphas_cumprod.to(self.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * output + (1 - alpha).sqrt() * x_t

    def _added_conditions(self, x_t: Tensor, text: Text) -> dict[str, Tensor] | None:
        if "pooled" not in text.vectors:
            return None
        height, width = x_t.shape[-2] * 8, x_t.shape[-1] * 8
        sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        pooled = text.vectors["pooled"].to(self.device, self.unet.dtype)
        return {"text_embeds": pooled, "time_ids": sizes.repeat(len(x_t), 1)}

    def checkpoint_blocks(self) -> list[nn.Module]:
        names = "ResnetBlock2D", "BasicTransformerBlock"
        return [module for module in self.unet.modules() if type(module).__name__ in names]
