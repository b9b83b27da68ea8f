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
from ...concepts.prompt_syntax import prompt_text, unescaped, weighted
from ...errors import ForgetError
from ...models.adapters import LayerModule
from ...models.clip_text_encoder import CLIPTextEncoder, check_one_chunk, refuse_words
from ...models.interface import Text, UNetModel
from ...models.module_patching import frozen, pre_hooked
from ...models.token_positions import CHUNK, EOS_ID

PARTS = "text_encoder", "text_encoder_2"
TOKENIZERS = "tokenizer", "tokenizer_2"
LARGE = 8  # ComfyUI breaks a piece of so many tokens at a chunk's end; shorter ones move on whole

Piece = tuple[str, float]  # and its weight
Chunk = list[tuple[int, float]]  # token ids and their weights


def pieces_of(prompt: Prompt) -> list[Piece]:
    """The pieces of a prompt, as ComfyUI cuts it.

    Raises:
        ForgetError: it has syntax that only other programs understand.
    """
    if "embedding:" in prompt.text:
        raise ForgetError(
            f"The prompt '{prompt.text:.80}' names an embedding file, which only ComfyUI reads: "
            "write it with words alone."
        )
    if prompt.plain:
        return [(unescaped(prompt.text), 1.0)]
    return weighted(prompt_text(prompt.text))


def chunks_of(tokenizer: Any, pieces: Sequence[Piece]) -> list[Chunk]:
    """A prompt's tokens in chunks of 77, as ComfyUI fills them."""
    chunks: list[Chunk] = [[]]
    for text, weight in pieces:
        piece = [(token, weight) for token in tokenizer(text, verbose=False).input_ids[1:-1]]
        large = len(piece) >= LARGE
        while len(piece) > (room := CHUNK - 2 - len(chunks[-1])):
            chunks[-1] += piece[: room * large]
            piece = piece[room * large :]
            chunks.append([])
        chunks[-1] += piece
    start, *_, pad = tokenizer("", padding="max_length", max_length=CHUNK).input_ids
    padding = [(pad, 1.0)] * (CHUNK - 2)
    return [[(start, 1.0), *words, (EOS_ID, 1.0), *padding[len(words) :]] for words in chunks]


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], device: torch.device
) -> Text:
    """Plain prompts of one chunk as the pipeline encodes them, [N, 77, D]; gradients flow."""
    encoded = pipeline.encode_prompt(
        prompt=list(prompts),
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    return Text(encoded[0], {"pooled": encoded[2]} if xl else {})


def tokenizers(pipeline: DiffusionPipeline) -> list[Any]:
    """One for each text encoder."""
    found = (getattr(pipeline, name, None) for name in TOKENIZERS)
    return [tokenizer for tokenizer in found if tokenizer is not None]


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
        for text in texts:
            check_one_chunk(text, len(self._ids(text)) // CHUNK)
        options = {"padding": "max_length", "max_length": CHUNK, "return_tensors": "pt"}
        plain = list(map(unescaped, texts))
        ids = [tokenizer(plain, **options).input_ids for tokenizer in tokenizers(self.pipeline)]
        return torch.stack(ids, 1)

    def encode_pieces(self, pieces: Sequence[Piece]) -> Text:
        """A prompt as ComfyUI encodes it: its chunks each by itself, [1, T, D].

        A token of weight w is w times as far from the empty prompt's at the same position. The
        pooled text is the first chunk's.
        """
        parts = [chunks_of(tokenizer, pieces) for tokenizer in tokenizers(self.pipeline)]
        chunks = torch.tensor(parts, dtype=torch.float32).transpose(0, 1)  # [chunks, E, 77, 2]
        ids = torch.cat([chunks[..., 0].long(), self.ids_of([""])])
        text, weights = self.encode_ids(ids), chunks[:, 0, :, 1, None].to(self.device)
        context = text.context[-1:].lerp(text.context[:-1], weights)
        vectors = {name: vector[:1] for name, vector in text.vectors.items()}
        return Text(context.flatten(0, 1)[None], vectors)

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
        text = encode_prompts(self.pipeline, [unescaped(prompt)], self.device)
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
