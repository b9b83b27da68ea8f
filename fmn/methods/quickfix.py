"""Diff-QuickFix (Basu et al. 2024, arXiv 2310.13730), a closed form on the text encoder.

The paper finds by causal tracing that CLIP's first self-attention layer holds what a name means,
and solves its output projection anew: what goes into it at a concept's tokens shall come out as
its anchor's does. Here as an exact low rank; the U-Net is not touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..closed_form.input_edit import Distances, compact, remaining_losses, uce
from ..closed_form.text_embeddings import Pairs, concept_pairs
from ..concepts.concept import Prompt
from ..linalg import gram, relative_error, to_float64
from ..models.interface import Text, UNetModel
from ..models.token_positions import CHUNK
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..progress import StepProgress
from ..settings import Settings as Base
from ..settings import setting
from . import shared_settings as shared

TITLE = "Diff-QuickFix"
REVISION = 1
ABOUT = (
    "Diff-QuickFix (arXiv 2310.13730): a closed form, done in a moment, that makes the text "
    "encoder's first layer read the concept's words as its anchor's. The patch is for the CLIP."
)
LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
TEMPLATES = "a photo of {}", "an image of {}", "a picture of {}"
KEPT_AT_ONCE = 32


@dataclass(frozen=True)
class Settings(Base, method="quickfix"):
    damping: float = setting(
        0.01,
        "Ridge penalty (lambda). Small: a stronger edit. Large: no edit.",
        limits=(1e-6, 1e6, 0.01),
    )
    preserve: float = setting(
        50.0,
        "Weight of the keep-list; 1 weighs it like the concepts. 0: no keep-list, as "
        "published, which harms most prompts. Higher: listed words change less.",
        limits=(0.0, 1000.0, 0.01),
    )
    tokens: str = shared.tokens(default="from-last")
    keep_list: str = shared.keep_list()
    rank: int = shared.solved_rank()


PRESETS = {"quickfix": Settings(), "quickfix-2024": Settings(preserve=0.0)}


@method_run(Settings)
@torch.no_grad()
def run(task: Task) -> ForgetPatch:
    """Solve for a patch of the text encoder; see ``methods.forget``.

    With W the projection, k what goes into it at a concept's tokens and v what comes out at its
    anchor's, W' = (l W + sum v k^T) (l I + sum k k^T)^-1. The bias is added behind W and stays, so
    v is W k* without it, and W' - W = W [sum (k* - k) k^T] (l I + sum k k^T)^-1: the form of
    ``input_edit.uce``, in the inputs of this layer.
    """
    model, settings = task.model, task.settings
    with model.borrow_text_encoder(words=False) as text_encoder:
        module = text_encoder.module(LAYER)
        with _layer_inputs(model, module) as inputs:
            # Embeddings that attacks on the U-Net found are none of this layer's inputs.
            named = [replace(concept, learned=()) for concept in task.concepts]
            pairs = Pairs.cat(concept_pairs(inputs, named, settings.tokens, lambda _: TEMPLATES))
            kept = _kept(inputs, task.kept_words(), pairs.targets)
        # Asked for again: encoding may have moved the encoder, and LoRAs out of its weights.
        weight = to_float64(text_encoder.module(LAYER).weight.detach()).cpu()
        edit = compact(uce(*pairs, kept, preserve=settings.preserve, damping=settings.damping))
        rank = settings.rank * len(task.concepts) or max(weight.shape)
        up, down, squares = Distances(pairs, edit.left).change(weight, edit.right, rank)
    lost, whole, *losses = squares
    task.on_step(StepProgress(1, 1, remaining_losses(*losses), 0.0))
    return task.patch({LAYER: (up.float(), down.float())}, losses, relative_error(lost, whole))


class _LayerInputs:
    """Encodes text as a model does, but gives the layer's inputs in place of contexts."""

    def __init__(self, model: UNetModel, inputs: list[Tensor]):
        self.model, self.inputs = model, inputs

    def tokenize(self, prompt: Prompt) -> Sequence[int | None]:
        return self.model.tokenize(prompt)

    def encode(self, prompt: Prompt) -> Text:
        self.inputs.clear()
        self.model.encode(prompt)
        # One row a chunk; ComfyUI puts the empty prompt behind them where words have weights.
        chunks = len(self.model.tokenize(prompt)) // CHUNK
        return Text(torch.cat(self.inputs)[:chunks].flatten(0, 1)[None].clone())

    def encode_all(self, texts: Sequence[str], length: int = CHUNK) -> Tensor:
        self.inputs.clear()
        self.model.encode_all(texts, length)
        return torch.cat(self.inputs).clone()


@contextmanager
def _layer_inputs(model: UNetModel, module: torch.nn.Module) -> Iterator[_LayerInputs]:
    inputs: list[Tensor] = []

    def record(module: object, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().cpu().double())

    with module.register_forward_pre_hook(record):
        yield _LayerInputs(model, inputs)


def _kept(inputs: _LayerInputs, words: Sequence[str], targets: Tensor) -> Tensor:
    """D rows whose k k^T add up to those of all positions of kept words, padding too.

    They are scaled to the number of target rows, so that a long list weighs no more than a short
    one.
    """
    total = torch.zeros(targets.shape[1], targets.shape[1], dtype=targets.dtype)
    for i in range(0, len(words), KEPT_AT_ONCE):
        total += gram(inputs.encode_all(words[i : i + KEPT_AT_ONCE]).flatten(0, 1))
    values, vectors = torch.linalg.eigh(total * len(targets) / max(1, CHUNK * len(words)))
    return values.clamp(min=0).sqrt()[:, None] * vectors.mT
