"""Diff-QuickFix (Basu et al. 2024, arXiv 2310.13730), a closed form on the text encoder.

The paper finds by causal tracing that CLIP's first self-attention layer holds what a name means,
and solves its output projection anew: what goes into it at a concept's tokens shall come out as
its anchor's does. Here as an exact low rank; the U-Net is not touched.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..closed_form.input_edit import (
    Distances,
    compact,
    finished,
    left_of,
    rank_setting,
    uce,
    weight_of,
)
from ..closed_form.text_embeddings import Pairs, concept_pairs, keep_list_setting, tokens_setting
from ..concepts.keep_list import keep_for
from ..linalg import gram, share
from ..models.families import layers_by_name
from ..models.interface import Text
from ..models.token_positions import CHUNK
from ..progress import StepProgress
from ..settings import Settings as Base
from ..settings import setting

TITLE = "Diff-QuickFix"
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
        "Weight of leaving the layer as it is (lambda). Small: a stronger edit. Large: none.",
        low=1e-6,
        high=1e6,
        step=0.01,
    )
    preserve: float = setting(
        10.0,
        "Weight of what is kept; 1 counts it as much as what is forgotten. 0: no keep-list, as "
        "published, which harms most prompts. Higher: what is listed changes less.",
        low=0.0,
        high=1000.0,
        step=0.01,
    )
    tokens: str = tokens_setting("from-last")
    keep_list: str = keep_list_setting()
    rank: int = rank_setting()


PRESETS = {"quickfix": Settings(), "quickfix-2024": Settings(preserve=0.0)}


def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Solve for a patch of the text encoder; see ``methods.forget``.

    With W the projection, k what goes into it at a concept's tokens and v what comes out at its
    anchor's, W' = (l W + sum v k^T) (l I + sum k k^T)^-1. The bias is added behind W and stays, so
    v is W k* without it, and W' - W = W [sum (k* - k) k^T] (l I + sum k k^T)^-1: the form of
    ``closed_form.uce``, in the inputs of this layer.
    """
    base = model.fingerprint()
    with model.borrow_text_encoder(words=False) as text_encoder, torch.no_grad():
        with _inputs(model, text_encoder.module(LAYER)) as inputs:
            # Embeddings that attacks on the U-Net found are none of this layer's inputs.
            named = [replace(concept, learned=()) for concept in concepts]
            pairs = Pairs.cat(concept_pairs(inputs, named, settings.tokens, lambda _: TEMPLATES))
            words = keep_for(concepts, keep, settings.keep_list) if settings.preserve else ()
            kept = _kept(inputs, words, pairs.targets)
        weight = weight_of(text_encoder, layers_by_name(model.family)[LAYER]).cpu()
        edit = compact(uce(*pairs, kept, preserve=settings.preserve, damping=settings.damping))
        rank = settings.rank * len(concepts) or max(weight.shape)
        up, down, sums = Distances(pairs, edit.left).change(weight, edit.right, rank)
    lost, whole, *losses = sums
    on_step(StepProgress(1, 1, left_of(*losses), 0.0))
    changes = {LAYER: (up.float(), down.float())}
    return finished(model, base, concepts, settings, changes, losses, share(lost, whole))


class _Inputs:
    """A model whose contexts are what goes into the layer, as ``contexts`` reads a model."""

    def __init__(self, model, seen):
        self.model, self.seen = model, seen

    def tokenize(self, prompt):
        return self.model.tokenize(prompt)

    def encode(self, prompt):
        self.seen.clear()
        self.model.encode(prompt)
        # One row a section; ComfyUI puts the empty prompt behind them where words have weights.
        sections = len(self.model.tokenize(prompt)) // CHUNK
        return Text(torch.cat(self.seen)[:sections].flatten(0, 1)[None].clone())

    def encode_all(self, texts, length=CHUNK):
        self.seen.clear()
        self.model.encode_all(texts, length)
        return torch.cat(self.seen).clone()


@contextmanager
def _inputs(model, module):
    seen = []
    with module.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().cpu().double())
    ):
        yield _Inputs(model, seen)


def _kept(inputs, words, targets):
    """D rows whose k k^T add up to those of all positions of what is kept, padding too.

    They are scaled to the number of target rows, so that a long list weighs no more than a short
    one.
    """
    total = torch.zeros(targets.shape[1], targets.shape[1], dtype=targets.dtype)
    for i in range(0, len(words), KEPT_AT_ONCE):
        total += gram(inputs.encode_all(words[i : i + KEPT_AT_ONCE]).flatten(0, 1))
    values, vectors = torch.linalg.eigh(total * len(targets) / max(1, CHUNK * len(words)))
    return values.clamp(min=0).sqrt()[:, None] * vectors.mT
