"""ComfyUI as a host, for the model families we know; ``comfy_other`` adds all others."""

from contextlib import contextmanager

import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.utils
import torch

from ...errors import ForgetError
from ...images import square
from ...models.families import INPUT_CHANNELS, identify, layers, layers_by_name
from ...models.interface import Text, fingerprint, two_encoders
from ...models.sampling import DRAWN_AT_ONCE
from ...models.token_positions import CHUNK
from .text_encoder import (
    FLOATS,
    borrow_text,
    bring_back,
    frozen,
    load_whole,
    plain_clip,
    plain_clone,
    shortened,
)

PREFIX = "diffusion_model."
ENCODED_AT_ONCE = 32 * CHUNK  # tokens
ALL_MEMORY = 1e20  # bytes beside the U-Net: no other model stays
TOKENIZERS = "l", "h"  # CLIP-L (also first of SDXL's two), OpenCLIP-H


class ComfyModel:
    """``fmn.models.interface.Model`` over a MODEL, with its CLIP and VAE where they are needed."""

    def __init__(self, patcher, clip=None, vae=None):
        self.patcher, self.clip, self.vae = patcher, clip, vae
        self.family = self._identify()
        self._compvis = {layer.name: layer.compvis for layer in layers(self.family)}
        sampling = patcher.get_model_object("model_sampling")
        v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        self.prediction = "v" if v else "epsilon"

    def _identify(self):
        family = known_family(self.patcher)
        if family is None:
            raise ForgetError(
                f"{type(self.patcher.model).__name__} is no model we know: use Stable Diffusion "
                "1.x, 2.x or XL here; on others, patches can be trained by the method ESD and worn."
            )
        return family

    def key(self, name):
        """ComfyUI's key of a layer's weight."""
        return f"{PREFIX}{self._compvis[name]}.weight"

    def fingerprint(self):
        def weight_of(layer):
            key = self.key(layer.name)
            # While a patched model is loaded, the untouched weights are in its backup.
            kept = self.patcher.backup.get(key)
            return comfy.utils.get_attr(self.patcher.model, key) if kept is None else kept.weight

        return fingerprint(self.family, weight_of)

    def tokenize(self, prompt):
        self._need_clip()
        sections = self.clip.tokenize(prompt.text, **plain(prompt))
        name = next((name for name in TOKENIZERS if name in sections), None)
        if name is None:
            raise self._wrong_clip(f"tokens for {', '.join(sections)}")
        ids = [token for section in sections[name] for token, *_ in section]
        return [int(token) if isinstance(token, int) else None for token in ids]

    def encode(self, prompt):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._need_clip()
        with torch.inference_mode():
            tokens = self.clip.tokenize(prompt.text, **plain(prompt))
            context, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
        if context.shape[-1] != self.family.context_dim or context.shape[1] % CHUNK:
            raise self._wrong_clip(f"text of width {context.shape[-1]}")
        vectors = {} if self.family.vector_dim is None else {"pooled": pooled.float().clone()}
        return Text(context.float().clone(), vectors)

    def encode_all(self, texts, length=CHUNK):
        self._need_clip()
        found, count = [], max(1, ENCODED_AT_ONCE // length)
        for i in range(0, len(texts), count):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # ComfyUI encodes the sections of a long prompt as one batch, each by itself.
            tokens = {}
            for text in texts[i : i + count]:
                for name, sections in self.clip.tokenize(text, disable_weights=True).items():
                    if len(sections) > 1:
                        raise ForgetError(f"'{text:.60}...' is too long: shorten it to 75 tokens.")
                    tokens[name] = tokens.get(name, []) + sections
            with torch.inference_mode(), shortened(self.clip.cond_stage_model, length):
                context = self.clip.encode_from_tokens(tokens)
            if context.shape[-1] != self.family.context_dim:
                raise self._wrong_clip(f"text of width {context.shape[-1]}")
            found.append(context.float().clone().unflatten(1, (-1, length))[0])
        return torch.cat(found)

    def text_module(self, name):
        self._need_clip()
        self.clip = plain_clip(self.clip)  # what is hooked is to be what encodes from now on
        return self._text_layer(name)

    def _text_layer(self, name):
        stage, path = self.clip.cond_stage_model, layers_by_name(self.family)[name].compvis
        try:
            return stage.get_submodule(path)
        except AttributeError as error:
            raise self._wrong_clip(f"no layer {path}") from error

    def _need_clip(self):
        if self.clip is None:
            raise ForgetError(
                "The CLIP input is empty (the checkpoint may have no text encoder): "
                "connect the CLIP that belongs to the model."
            )

    def _wrong_clip(self, gives):
        return ForgetError(
            f"This CLIP gives {gives}, but {self.family.title} reads text of width "
            f"{self.family.context_dim}: connect the CLIP of the same checkpoint."
        )

    def sample(self, prompt, seeds, size, steps, guidance):
        seeds = list(seeds)
        with torch.inference_mode():
            empty = torch.zeros(1, 4, size // 8, size // 8)
            noise = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
            texts = self._conditioning(prompt), self._conditioning(prompt._replace(text=""))
            found = [
                comfy.sample.sample(
                    self.patcher, part, steps, guidance, "euler", "normal", *texts,
                    torch.zeros_like(part), seed=seeds[0],
                )
                for part in noise.split(DRAWN_AT_ONCE)
            ]  # fmt: skip
        return self.patcher.model.process_latent_in(torch.cat(found)).float().cpu()

    def _conditioning(self, prompt):
        return self.clip.encode_from_tokens_scheduled(
            self.clip.tokenize(prompt.text, **plain(prompt))
        )

    def encode_images(self, images, size):
        if self.vae is None:
            raise ForgetError(
                "A concept has reference pictures but the VAE input is empty: "
                "connect the checkpoint's VAE, or remove the pictures."
            )
        with torch.inference_mode():
            latents = self.vae.encode(square(images, size).movedim(1, -1))
        return self.patcher.model.process_latent_in(latents.clone()).float().cpu()

    def decode(self, latents):
        if self.vae is None:
            raise ForgetError(
                "Pictures are to be drawn but the VAE input is empty: connect the checkpoint's VAE."
            )
        if self.vae.latent_channels != latents.shape[1]:
            raise ForgetError(
                f"This VAE reads {self.vae.latent_channels} channels, but {self.family.title} has "
                f"{latents.shape[1]}: use the VAE of the same checkpoint."
            )
        with torch.inference_mode():
            pictures = self.vae.decode(self.patcher.model.process_latent_out(latents.clone()))
        return pictures[..., :3].float().cpu().clone().clamp(0, 1)

    def _check_precision(self, model):
        for layer in layers(self.family):
            weight = comfy.utils.get_attr(model, self.key(layer.name))
            plain = type(weight) in (torch.Tensor, torch.nn.Parameter)
            if weight.dtype not in FLOATS or not plain:
                kind = str(weight.dtype).removeprefix("torch.")
                raise ForgetError(
                    f"The model's weights are quantised ({layer.compvis} is {kind}) and cannot be "
                    "trained on: train on the same model loaded in float16, bfloat16 or float32 "
                    "(weight_dtype default), and apply the patch here."
                )

    @contextmanager
    def borrow(self):
        """Load the U-Net so that autograd can use it; see ``docs/architecture.md``."""
        channels = self.patcher.model.diffusion_model.in_channels
        if channels not in INPUT_CHANNELS:
            raise ForgetError(
                f"This model reads {channels} channels, and only 4, 8 (editing models) and 9 "
                "(inpainting models) can be trained on: train on its base model and apply the "
                "patch here."
            )
        if channels != (given := 4 + self._channels_beside_noise()):
            raise ForgetError(
                f"This {self.family.title} reads {channels} channels, but ComfyUI gives it "
                f"{given}, as it knows no such variant of the family: train on its base model."
            )
        with self._loaded() as patcher:
            yield Borrowed(self, patcher)

    def _channels_beside_noise(self):
        x = torch.zeros(1, 4, 8, 8)
        beside = self.patcher.model.concat_cond(noise=x, latent_image=x, device=x.device)
        return 0 if beside is None else beside.shape[1]

    @contextmanager
    def _loaded(self):
        """A clone of the patcher, wholly loaded, frozen and ready for autograd."""
        patcher = plain_clone(self.patcher)
        self._check_precision(patcher.model)
        load_whole(patcher, ALL_MEMORY)
        with frozen(patcher.model):
            yield patcher

    @contextmanager
    def borrow_text(self, words=True):
        """Load the text encoders so that autograd can use them."""
        self._need_clip()
        if words and self.family.vector_dim is not None:
            raise two_encoders(self.family)
        self.clip = plain_clip(self.clip)
        with borrow_text(self) as borrowed:
            yield borrowed

    def patched(self, patch, strength):
        """A clone of the MODEL with the patch on it; ComfyUI merges it when it loads the model."""
        patch.check_family(self.family)
        patch.check_shapes(
            lambda layer: comfy.utils.get_attr(self.patcher.model, self.key(layer.name))
        )
        clone = self.patcher.clone()
        _put_on(clone, comfy.lora.model_lora_keys_unet(clone.model, {}), patch, strength, False)
        return clone

    def patched_clip(self, patch, strength):
        """A clone of the CLIP with the patch's changes of the text encoder on it."""
        patch.check_family(self.family)
        self._need_clip()
        patch.check_shapes(lambda layer: self._text_layer(layer.name).weight, text=True)
        clone = self.clip.clone()
        names = comfy.lora.model_lora_keys_clip(clone.cond_stage_model, {})
        _put_on(clone, names, patch, strength, True)
        return clone


class Borrowed:
    """``fmn.models.interface.Borrowed`` over a loaded patcher."""

    context_argument = "context"

    def __init__(self, host, patcher):
        self.host, self.patcher, self.model = host, patcher, patcher.model
        self.device = self.model.device
        # ComfyUI may leave a replaced model_sampling on the CPU.
        self.sigmas = self.model.model_sampling.sigmas.to(self.device).clone()
        # ComfyUI's x is the clean latent plus sigma times noise; x_t has unit variance.
        self.scales = (1 + self.sigmas**2).sqrt()
        self.alphas_cumprod = 1 / (1 + self.sigmas.float() ** 2)

    def module(self, name):
        # Its weight may be read, which lacks the user's LoRAs while it is away.
        self._back()
        return self.model.diffusion_model.get_submodule(self._path(name))

    def _path(self, name):
        if name.endswith(".attn2"):
            return self.host._compvis[f"{name}.to_q"].removesuffix(".to_q")
        return self.host._compvis[name]

    def _back(self):
        # The VAE or the text encoder may have needed the memory.
        bring_back(self.patcher, self.device, ALL_MEMORY)

    def denoise(self, x_t, t, text):
        # A step of a method may draw for a while first.
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._back()
        t = t.to(self.device)
        sigma = self.sigmas[t]
        x = x_t.to(self.device) * self.scales[t].view(-1, 1, 1, 1)
        options = {"optimized_attention_override": _fused_attention}
        conditions = self._conditions(x, text)
        clean = self.model.apply_model(x, sigma, transformer_options=options, **conditions)
        return (x - clean) / sigma.view(-1, 1, 1, 1)

    def _conditions(self, x, text):
        given = {"cross_attn": text.context.to(self.device), "noise": x, "device": self.device}
        # Without a mask, inpainting models get an empty picture to fill, whatever this one shows.
        given["latent_image"] = x
        if "pooled" in text.vectors:
            height, width = x.shape[-2] * 8, x.shape[-1] * 8
            given |= {"pooled_output": text.vectors["pooled"], "height": height, "width": width}
        return self._made(x, given)

    def _made(self, x, given):
        """The model's own inputs from what ComfyUI's sampler gives it."""
        made = self.model.extra_conds(**given)
        return {
            name: value.process_cond(batch_size=len(x), device=self.device, area=None).cond
            for name, value in made.items()
        }

    def checkpoint_blocks(self):
        names = "ResBlock", "BasicTransformerBlock"
        return [m for m in self.model.diffusion_model.modules() if type(m).__name__ in names]


def known_family(patcher):
    """The family of ``families.FAMILIES`` that a MODEL is of, or None."""
    unet = getattr(patcher.model, "diffusion_model", None)
    shapes = {
        name: module.weight.shape
        for name, module in (unet.named_modules() if unet is not None else ())
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    return identify(shapes)


def _put_on(clone, names, patch, strength, text):
    """Add the patch's U-Net or text part to a clone of a patcher or a CLIP."""
    layers = [layer for layer in patch.layers if layer.is_text == text]
    tensors = patch.lora(torch.float32, layers)
    applied = clone.add_patches(comfy.lora.load_lora(tensors, names), strength)
    if len(applied) != len(layers):
        raise ForgetError(
            f"The model has only {len(applied)} of the patch's {len(layers)} layers: "
            "use a patch made for the model's family."
        )


def _fused_attention(function, *args, **kwargs):
    """Self-attention through PyTorch's kernel: ComfyUI's default on a CPU keeps far more."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def plain(prompt):
    """What the tokenizer is to be told: the words of a plain prompt carry no weights."""
    return {"disable_weights": True} if prompt.plain else {}
