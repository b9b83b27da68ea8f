"""diffusers' Flux as a host: the demo transformer, with the demo model's text encoder and VAE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...files import DEMO_FOLDER
from ...models.adapters import LayerModule
from ...models.families import layers, layers_by_name
from ...models.interface import Text, TextEncoder
from ...models.module_patching import frozen
from ...models.sampling import SigmaSchedule, drawn
from ...models.transformers import BY_KEY, Reader
from ...models.unknown_family import UnknownFamily, family_of_model
from .load import load_pipeline
from .model import DiffusersModel
from .pipeline_model import PipelineModel
from .text_encoder import evaluating, pieces_of

DEMO_TRANSFORMER = DEMO_FOLDER / "fmn-demo-dit.safetensors"
CONFIG = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 4,
    "attention_head_dim": 32, "num_attention_heads": 6, "joint_attention_dim": 128,
    "pooled_projection_dim": 128, "guidance_embeds": False, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
# Layers that both hosts have beside the readers: all but linear1 of single blocks, in which ComfyUI
# joins what diffusers has apart.
MORE_LAYERS = (
    Reader("img_in", "x_embedder"),
    *(
        Reader(f"double_blocks.{{}}.{comfy}", f"transformer_blocks.{{}}.{diffusers}")
        for comfy, diffusers in {
            "img_attn.qkv": "attn.to_qkv", "txt_attn.qkv": "attn.to_added_qkv",
            "txt_attn.proj": "attn.to_add_out",
            "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        }.items()
    ),
    Reader("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
)  # fmt: skip
TOKENS = 24  # of a prompt
END = 49407
LEVELS = 1000


def velocity(
    flux: FluxTransformer2DModel, latents: Tensor, sigmas: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """Velocity, noise - picture, of latents [B, C, h, w] at sigmas [B] in 0..1.

    Args:
        context: [B, T, D]. pooled: [B, P].
    """
    high, wide = latents.shape[2] // 2, latents.shape[3] // 2
    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(float(high)), torch.arange(float(wide))
    )
    (found,) = flux(
        hidden_states=rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=sigmas,
        img_ids=grid.to(latents),
        txt_ids=torch.zeros(context.shape[1], 3).to(latents),
        return_dict=False,
    )
    return rearrange(found, "b (h w) (c p q) -> b c (h p) (w q)", p=2, q=2, h=high)


class DiffusersTransformer(PipelineModel[UnknownFamily]):
    """``fmn.models.interface.Model`` over the demo transformer."""

    is_demo, prediction, quantised = True, "flow", False

    def __init__(self, flux: FluxTransformer2DModel, pipeline: Any) -> None:
        flux.fuse_qkv_projections()  # as ComfyUI has them, so that a patch fits both
        self.flux, self.pipeline = flux.eval().requires_grad_(False), pipeline
        self.family, self.paths = _family(flux)

    @classmethod
    def load_demo(cls, device: torch.device | str | None = None) -> DiffusersTransformer:
        """The demo transformer, in float32."""
        if not DEMO_TRANSFORMER.is_file():
            raise ForgetError(
                f"The demo transformer is missing at '{DEMO_TRANSFORMER}': install again."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        flux = FluxTransformer2DModel(**CONFIG)
        weights = load_file(DEMO_TRANSFORMER)
        flux.load_state_dict({key: value.float() for key, value in weights.items()})
        return cls(flux.to(device), load_pipeline("demo").to(device))

    @property
    def device(self) -> torch.device:
        return self.flux.device

    def _module(self, name: str) -> LayerModule:
        if name not in layers_by_name(self.family):
            raise ForgetError(
                f"The patch changes '{name}', which this {self.family.title} does not have: use a "
                "patch made for this variant."
            )
        return self.flux.get_submodule(self.paths[name])

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Text:
        return self.encode_texts([_plain_text(prompt)])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Text:
        """Texts as one batch: the first tokens' states and, as pooled text, that of the end."""
        ids = self.pipeline.tokenizer(
            list(texts), padding="max_length", max_length=TOKENS, return_tensors="pt"
        ).input_ids
        if ids.shape[1] > TOKENS:
            raise ForgetError(
                f"A prompt has {ids.shape[1]} tokens, the demo transformer reads {TOKENS}: "
                f"shorten '{max(texts, key=len):.60}'."
            )
        states = self.pipeline.text_encoder(ids.to(self.device))[0]
        ends = (ids == END).int().argmax(1)
        return _text(states, states[torch.arange(len(ids)), ends])

    @torch.no_grad()
    def sample_latents(
        self, texts: Sequence[str | Prompt], noise: Tensor, steps: int, guidance: float
    ) -> Tensor:
        plain = [text if isinstance(text, str) else _plain_text(text) for text in texts]
        text, empty = self.encode_texts(plain), self.encode_texts([""])
        return drawn(_Denoiser(self), text, empty, noise, steps, guidance)

    @contextmanager
    def borrow_text_encoder(self) -> Iterator[_TextEncoder]:
        """The demo model's, to learn words with."""
        with DiffusersModel(self.pipeline).borrow_text_encoder() as encoder:
            yield _TextEncoder(encoder)

    @contextmanager
    def borrow_denoiser(self) -> Iterator[_Denoiser]:
        with evaluating([self.flux]), frozen([self.flux]):
            yield _Denoiser(self)

    @contextmanager
    def watch(self, batch: int = 1, side: int = 8) -> Iterator[_Denoiser]:
        yield _Denoiser(self)


class _TextEncoder:
    """What ``textual_inversion`` uses of ``fmn.models.interface.TextEncoder``."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.width, self.device = encoder, encoder.width, encoder.device
        self.vectors = encoder.vectors

    def encode(self, prompt: str, vectors: Tensor | None = None) -> tuple[Text, Tensor]:
        """See ``TextEncoder.encode``; the transformer reads the first tokens alone."""
        text, pooled = self.encoder.encode(prompt, vectors)
        return _text(text.context[:, :TOKENS], pooled), pooled


class _Denoiser:
    """``fmn.models.interface.Denoiser`` and ``Watched`` over a Flux."""

    def __init__(self, model: DiffusersTransformer) -> None:
        self.model, self.device = model, model.device
        levels = torch.linspace(1 / LEVELS, 1, LEVELS)
        self.schedule = SigmaSchedule(levels, torch.ones(LEVELS), 1 - levels)

    def module(self, name: str) -> LayerModule:
        return self.model._module(name)

    def predict_noise(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        pooled = text.vectors["pooled_output"].to(self.device)
        sigmas = self.schedule.levels.to(self.device)[t.to(self.device)]
        context = text.context.to(self.device)
        return velocity(self.model.flux, x_t.to(self.device), sigmas, context, pooled)

    @torch.no_grad()
    def predict_each(self, x_t: Tensor, t: int, texts: Sequence[Text]) -> Tensor:
        return self.predict_noise(x_t, torch.full((len(x_t),), t), Text.cat(texts))

    def checkpoint_blocks(self) -> list[nn.Module]:
        flux = self.model.flux
        return [*flux.transformer_blocks, *flux.single_transformer_blocks]


def _text(states: Tensor, pooled: Tensor) -> Text:
    return Text(states, {"pooled_output": pooled})


def _plain_text(prompt: Prompt) -> str:
    pieces = pieces_of(prompt)
    if any(weight != 1 for _, weight in pieces):
        raise ForgetError(
            f"The demo transformer reads prompts without weights, and '{prompt.text:.60}' has "
            "some: leave them out."
        )
    return "".join(text for text, _ in pieces)


def _family(flux: FluxTransformer2DModel) -> tuple[UnknownFamily, dict[str, str]]:
    """The family, of the layers that both hosts have, and the path of each by its name."""
    entry, known = BY_KEY["flux"], dict(flux.named_modules())
    paths = dict(replace(entry, readers=entry.readers + MORE_LAYERS).diffusers_paths(known))
    shapes = {comfy: known[path].weight.shape for comfy, path in paths.items()}
    family = family_of_model("Flux", shapes, latent_channels=4, entry=entry, resolution=128)
    return family, {layer.name: paths[layer.compvis] for layer in layers(family)}
