"""The text encoders of a diffusers pipeline, for methods that look inside or learn words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...concepts.concept import Prompt
from ...models.adapters import LayerModule
from ...models.clip_text_encoder import CLIPTextEncoder, refuse_words
from ...models.interface import Text, UNetModel
from ...models.module_patching import frozen, pre_hooked
from ...models.token_positions import CHUNK

PARTS = "text_encoder", "text_encoder_2"


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device
) -> Text:
    """Plain prompts as the pipeline encodes them, [N, 77, D]; gradients flow."""
    encoded = pipeline.encode_prompt(
        prompt=list(prompts),
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    return Text(encoded[0], {"pooled": encoded[2]} if xl else {})


@contextmanager
def borrow_text_encoder(
    model: UNetModel, pipeline: DiffusionPipeline, words: bool
) -> Iterator[TextEncoder]:
    """``UNetModel.borrow_text_encoder`` of a model over a pipeline."""
    if words:
        refuse_words(model.family)
    encoders = [getattr(pipeline, part) for part in PARTS[: len(model.family.texts)]]
    with evaluating(encoders), frozen(encoders):
        yield TextEncoder(model, pipeline, encoders)


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules out of training mode, for a while."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval()
        yield


@contextmanager
def shortened(pipeline: DiffusionPipeline, length: int) -> Iterator[None]:
    """The text encoders compute the first ``length`` of 77 tokens alone, for a while."""

    def truncate(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs = kwargs | {"attention_mask": mask[:, :length]}
        return (args[0][:, :length], *args[1:]), kwargs

    encoders = [getattr(pipeline, part, None) for part in PARTS if length < CHUNK]
    with pre_hooked([encoder for encoder in encoders if encoder], truncate, with_kwargs=True):
        yield


class TextEncoder(CLIPTextEncoder):
    """``fmn.models.interface.TextEncoder`` over a pipeline's text encoders."""

    def __init__(
        self, model: UNetModel, pipeline: DiffusionPipeline, encoders: Sequence[CLIPTextModel]
    ) -> None:
        super().__init__(model.family)
        self.model, self.pipeline, self.encoders = model, pipeline, encoders

    @property
    def embedding(self) -> nn.Embedding:
        return self.encoders[0].get_input_embeddings()

    def module(self, name: str) -> LayerModule:
        return self.model.text_module(name)

    def _ids(self, text: str) -> list[int]:
        return cast(list[int], self.model.tokenize(Prompt(text, text)))

    def ids_of(self, texts: Sequence[str]) -> Tensor:
        names = ("tokenizer", "tokenizer_2")[: len(self.encoders)]
        tokenizers = [getattr(self.pipeline, name) for name in names]
        for text in texts:
            self._ids(text)  # refuses long ones
        options = {"padding": "max_length", "max_length": CHUNK, "return_tensors": "pt"}
        ids = [tokenizer(list(texts), **options).input_ids for tokenizer in tokenizers]
        return torch.stack(ids, 1)

    def _states(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        outputs = [
            encoder(part.to(encoder.device), output_hidden_states=self.pair)
            for encoder, part in zip(self.encoders, ids.unbind(1))
        ]
        if not self.pair:
            return [(output.last_hidden_state, output.pooler_output) for output in outputs]
        # As SDXL reads them: both last but one states, and the second's projected pooled text.
        pooled = outputs[1].text_embeds
        return [(output.hidden_states[-2], pooled) for output in outputs]

    def _encode_pair(self, prompt: str) -> Text:
        text = encode_prompts(self.pipeline, [prompt], self.device)
        return Text(text.context.float(), {"pooled": text.vectors["pooled"].float()})

    def _encode_chunk(self, ids: list[int | None], vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        indices = [i for i, token in enumerate(ids) if token is None]
        # Any word will do under the vectors: the encoder only looks for its first EOT in the ids.
        words = torch.tensor([[0 if token is None else token for token in ids]])

        def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            if vectors is None:
                return output
            index = torch.tensor(indices, device=output.device)
            return output.index_copy(1, index, vectors.to(output)[None])

        with self.embedding.register_forward_hook(replace):
            output = self.encoders[0](words.to(self.device))
        return output.last_hidden_state, output.pooler_output
