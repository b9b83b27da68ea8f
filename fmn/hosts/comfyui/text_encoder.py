"""ComfyUI's text encoders, to look inside and to learn words; weights that autograd accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...concepts.concept import Prompt
from ...errors import ForgetError
from ...models.adapters import LayerModule
from ...models.clip_text_encoder import CLIPTextEncoder, check_one_chunk
from ...models.interface import Text, UNetModel
from ...models.module_patching import frozen, pre_hooked
from ...models.token_positions import CHUNK, EOS_ID

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

FLOATS = torch.float32, torch.float16, torch.bfloat16
# Names of a part in the tokenizer -> in the encoder
ENCODERS = {"l": "clip_l", "h": "clip_h", "g": "clip_g"}


def _is_paged(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI moves the weights in and out while they are used, as on GPUs from 0.16 on."""
    return "disable_dynamic" in inspect.signature(patcher.clone).parameters and patcher.is_dynamic()


def unpaged(patcher: ModelPatcher) -> ModelPatcher:
    """A clone that autograd can work with; of paged weights that is a copy, read from the file."""
    if not _is_paged(patcher):
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ForgetError(
            f"ComfyUI cannot make a trainable copy of this model ({error}): load it with the "
            "stock checkpoint loader."
        ) from error


def unpaged_clip(clip: CLIP) -> CLIP:
    """The CLIP, or one with a copy of its text encoders if their weights are paged."""
    if not _is_paged(clip.patcher):
        return clip
    clone = clip.clone()
    clone.patcher = unpaged(clip.patcher)
    clone.cond_stage_model = clone.patcher.model
    return clone


def load_whole(patcher: ModelPatcher, beside: float = 0) -> None:
    """Load all of a model, with its LoRAs in the weights, whatever memory ComfyUI finds free.

    Args:
        beside: bytes needed to work on it, for which ComfyUI unloads other models.
    """
    comfy.model_management.load_models_gpu([patcher], memory_required=beside, force_full_load=True)
    if patcher.model.model_lowvram:  # --novram counts for more than force_full_load
        patcher.partially_load(patcher.load_device, 1e32)


def reload_if_moved(patcher: ModelPatcher, device: torch.device, beside: float = 0) -> None:
    """``load_whole`` again, if ComfyUI has moved the model or a part of it since.

    Parts moved away hold the file's weights, as ComfyUI then adds LoRAs while a layer runs: call
    this before reading a weight.

    Args:
        device: where the model was.
    """
    if patcher.model.device != device or patcher.model.model_lowvram:
        load_whole(patcher, beside)
        leave_inference_mode(patcher.model)  # ComfyUI loads in it


@contextmanager
def borrow_text_encoder(host: UNetModel, clip: CLIP) -> Iterator[TextEncoder]:
    """``UNetModel.borrow_text_encoder`` of a ``ComfyModel`` with this CLIP."""
    load_whole(clip.patcher)
    with trainable(clip.patcher.model):
        text_encoder = TextEncoder(host, clip)
        with _copied_inputs(text_encoder.stage):
            yield text_encoder


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """A loaded model with frozen weights through which gradients flow, for a while."""
    with torch.inference_mode(False):
        leave_inference_mode(model)
        try:
            with frozen([model]):
                yield
        finally:
            comfy.model_management.soft_empty_cache()


def leave_inference_mode(model: nn.Module) -> None:
    """Replace weights and buffers that were made in inference mode by equal ones that were not.

    Autograd refuses the former even as constants. Values do not change; one weight at a time is
    held twice.
    """
    # Names, not a list of pairs: that would keep every old weight alive to the end.
    for name in [name for name, _ in model.named_parameters()]:
        parameter = comfy.utils.get_attr(model, name)
        if parameter.is_inference():
            flag = parameter.requires_grad
            comfy.utils.set_attr_param(model, name, parameter.detach().clone())
            comfy.utils.get_attr(model, name).requires_grad_(flag)
    for name in [name for name, _ in model.named_buffers()]:
        buffer = comfy.utils.get_attr(model, name)
        if buffer.is_inference():
            comfy.utils.set_attr(model, name, buffer.clone())


def _copied_inputs(encoder: nn.Module) -> AbstractContextManager[None]:
    """ComfyUI adds to hidden states in place, and backward needs the norms' inputs."""
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    return pre_hooked(norms, lambda module, args: (args[0].clone(), *args[1:]))


def shortened(stage: nn.Module, length: int) -> AbstractContextManager[None]:
    """CLIP encoders compute the first ``length`` of 77 tokens alone, for a while."""

    def truncate(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        mask = kwargs["mask"][..., :length, :length]
        return (args[0][:, :length], *args[1:]), kwargs | {"mask": mask}

    encoders = [module for module in stage.modules() if type(module).__name__ == "CLIPEncoder"]
    return pre_hooked(encoders if length < CHUNK else [], truncate, with_kwargs=True)


def tokens_of(clip: CLIP, text: str) -> dict[str, list]:
    """What the tokenizer gives for a plain string of one chunk."""
    tokens = clip.tokenize(text, disable_weights=True)
    check_one_chunk(text, max(map(len, tokens.values())))
    return tokens


class TextEncoder(CLIPTextEncoder):
    """``fmn.models.interface.TextEncoder`` over a loaded CLIP."""

    def __init__(self, host: UNetModel, clip: CLIP) -> None:
        super().__init__(host.family)
        self.host, self.clip, self.stage = host, clip, clip.cond_stage_model
        parts = clip.tokenize("", disable_weights=True)
        names = [config.comfy for config in host.family.texts]
        if {ENCODERS.get(key) for key in parts} != set(names) or not all(
            hasattr(self.stage, name) for name in names
        ):
            raise ForgetError(
                f"This CLIP gives tokens for {', '.join(parts)}, but {host.family.title} has "
                f"the text encoder {' and '.join(names)}: connect the CLIP of the same checkpoint."
            )
        self.encoders = [getattr(self.stage, name) for name in names]
        self.keys = [next(key for key in parts if ENCODERS[key] == name) for name in names]
        _check_precision(self.embedding)
        self.loaded_on, self.hooked = clip.patcher.model.device, False

    @property
    def embedding(self) -> nn.Embedding:
        return self.encoders[0].transformer.get_input_embeddings()

    def module(self, name: str) -> LayerModule:
        reload_if_moved(self.clip.patcher, self.loaded_on)
        self.hooked = True
        return _check_precision(self.host.text_module(name))

    def _ids(self, text: str) -> list[int]:
        ids = self.host.tokenize(Prompt(text, text))
        if None in ids:
            raise ForgetError(
                f"The text '{text:.60}' uses an embedding file: write it with words alone."
            )
        return cast(list[int], ids)

    def vectors(self, words: str) -> Tensor:
        return super().vectors(words).cpu()  # ComfyUI may move the model away

    def ids_of(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            self._ids(text)  # refuses embedding files
            tokens = tokens_of(self.clip, text)
            rows.append([[token for token, *_ in tokens[key][0]] for key in self.keys])
        return torch.tensor(rows)

    def _encode_pair(self, prompt: str) -> Text:
        tokens = self.clip.tokenize(prompt, disable_weights=True)
        with self._ready(projected=True):
            context, pooled = self.stage.encode_token_weights(tokens)[:2]
        return Text(context.float(), {"pooled": pooled.float()})

    def _encode_chunk(
        self, ids: Sequence[int | None], vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows = iter(() if vectors is None else vectors)
        chunk = [(next(rows) if token is None else token, 1.0) for token in ids]
        with self._ready():
            context, pooled = self.stage.encode_token_weights({self.keys[0]: [chunk]})[:2]
        return context, pooled

    def _states(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        length = ids.shape[2]
        # ComfyUI adds all 77 position embeddings, so tokens are cut off after that.
        padded = nn.functional.pad(ids, (0, CHUNK - length), value=EOS_ID).unbind(1)
        with self._ready(projected=self.pair), shortened(self.stage, length):
            outputs = [encoder.encode(ids.tolist()) for encoder, ids in zip(self.encoders, padded)]
        return [(context, pooled) for context, pooled, *_ in outputs]

    @contextmanager
    def _ready(self, projected: bool = False) -> Iterator[None]:
        """Set up as ``CLIP.encode_from_tokens`` does.

        Args:
            projected: the pooled text, as the encoders choose; False: never.
        """
        # ComfyUI may have moved the encoder since, and does so in inference mode. A method that
        # hooks it goes on with its earlier outputs, on the device of those. Others take it from
        # anywhere; reloading it for them would drive the U-Net out in each step of hardening.
        if self.hooked:
            reload_if_moved(self.clip.patcher, self.loaded_on)
        leave_inference_mode(self.stage)
        self.stage.reset_clip_options()
        if self.clip.layer_idx is not None:
            self.stage.set_clip_options({"layer": self.clip.layer_idx})
        if not projected:
            self.stage.set_clip_options({"projected_pooled": False})
        try:
            yield
        finally:
            self.stage.reset_clip_options()


def _check_precision(module: Any) -> Any:
    """The module, if its weights are plain numbers."""
    weight = module.weight
    if weight.dtype not in FLOATS or type(weight) is not nn.Parameter:
        kind = str(weight.dtype).removeprefix("torch.")
        raise ForgetError(
            f"The CLIP's weights are quantised ({kind}): load it in float16, bfloat16 or float32 "
            "to work on it."
        )
    return module
