"""One patch that does what several do, each on its own prompts; ``patches.joint`` solves it.

The model encodes the patches' prompts, which is what keys and values of cross-attention read. What
its outputs read is computed from them and the queries of a few sampled images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..closed_form.output_edit import PartProgress
from ..concepts.concept import Concept, Prompt
from ..concepts.concept_list import FIELDS, concept_of
from ..concepts.prompt_templates import sentences
from ..errors import ForgetError
from ..methods.reread.attention_output import cross_attention_layers, read_out, record_queries
from ..methods.reread.method import Settings, kept_texts
from ..methods.reread.regression_data import AT_ONCE, KeptSentences
from ..models.interface import Text
from ..models.module_patching import autograd
from ..patches.joint import Factors, LayerInputs, joint_change, layer_inputs
from ..patches.merge import Merged, build_merged, open_patches
from ..patches.patch import ForgetPatch
from ..progress import OnStep, ignore
from ..sequences import evenly
from ..settings import PRESERVE

if TYPE_CHECKING:
    from ..models.interface import UNet, UNetModel

MAX_PROMPTS = 40  # of one concept
OUTPUT = ".attn2.to_out.0"


@autograd()
@torch.no_grad()
def joint_merge(
    model: UNetModel,
    sources: Sequence[tuple[ForgetPatch | str | Path, float]],
    preserve: float = PRESERVE,
    budget: int = 0,
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
) -> Merged:
    """Solve for the merged patch.

    The recorded losses are sums over layers of the minimised terms, relative to no change at all:
    first for the sum of the patches, then for the solution.

    Args:
        sources: (patch or path of its file, strength).
        preserve: weight of kept prompts. budget: bytes that the file may have; 0: any.
        keep: words or prompts to keep, beside the shipped lists.

    Raises:
        ForgetError: the model is no U-Net; a patch is of another family, does not say what it
            forgets, or changes layers other than keys, values and outputs of cross-attention.
    """
    if not model.family.known:
        raise ForgetError(
            f"Joint merging is for U-Nets, whose cross-attention reads a fixed text, and "
            f"{model.family.title} is none: merge with concatenate."
        )
    entries = open_patches(sources)
    for patch, _ in entries:
        patch.check_family(model.family)
        _check_layers(patch)
    # Few sentences: how well this merges was measured with them (docs/batch.md).
    settings = Settings(preserve=preserve, prompts=10, near_words=0)
    concepts = [_concepts(patch) for patch, _ in entries]
    prompts = [_prompts(forgotten, settings.prompts) for forgotten in concepts]
    kept = kept_texts(model, sum(concepts, []), keep, settings)
    names = list(dict.fromkeys(layer.name for patch, _ in entries for layer in patch.layers))
    sampled = []
    if any(name.endswith(OUTPUT) for name in names):
        sampled = [_subsample(texts, settings.images_per_concept) for texts in (*prompts, kept)]
    batches = sum(-(-len(texts) // AT_ONCE) for texts in sampled)
    progress = PartProgress(on_step, batches + len(names))
    with model.borrow_denoiser() as denoiser:
        reader = _InputReader(model, denoiser, settings, prompts, kept)
        if sampled:
            reader.record_queries(sampled, lambda: progress(1.0))
        changes, sums = {}, torch.zeros(3, dtype=torch.float64)
        for name in names:
            parts = [_strengthened(patch, name, strength) for patch, strength in entries]
            changes[name], squares = joint_change(parts, reader.of(name))
            sums += torch.tensor(squares, dtype=torch.float64)
            progress(float(sums[1] / sums[2]))
    record = {"how": "joint", "budget": budget, "preserve": preserve, "damping": settings.damping}
    losses = (sums[:2] / sums[2]).tolist()
    return build_merged(entries, changes, record, budget, losses)


def _strengthened(patch: ForgetPatch, name: str, strength: float) -> Factors | None:
    """A layer's factors in float64, the strength in the first; None if it is unchanged."""
    if name not in patch.changes:
        return None
    up, down = patch.changes[name]
    return strength * up.double(), down.double()


def _check_layers(patch: ForgetPatch) -> None:
    for layer in patch.layers:
        if not (layer.is_key_or_value or layer.name.endswith(OUTPUT)):
            raise ForgetError(
                f"The patch for {', '.join(patch.concepts):.80} changes '{layer.name}', and joint "
                "merging supports only keys, values and outputs of cross-attention: merge it with "
                "concatenate."
            )


def _concepts(patch: ForgetPatch) -> list[Concept]:
    """What a patch forgets, by its metadata, which is untrusted."""
    concepts = [
        concept_of({key: value for key, value in entry.items() if key in FIELDS})
        for entry in patch.info.get("concepts", [])
    ]
    if not concepts:
        raise ForgetError(
            "A patch does not say what it forgets, which joint merging needs: merge it with "
            "concatenate."
        )
    return concepts


def _prompts(concepts: list[Concept], count: int) -> list[str]:
    """Names and sentences of each concept, at most ``MAX_PROMPTS``."""
    texts = ([*c.subjects, *(text for text, _ in sentences(c, count))] for c in concepts)
    return [text for some in texts for text in _subsample(some, MAX_PROMPTS)]


def _subsample(texts: list[str], count: int) -> list[str]:
    """At most ``count`` texts, at even distances."""
    return evenly(texts, min(count, len(texts)))


class _InputReader:
    """What layers read for each patch's prompts, and for kept ones."""

    def __init__(
        self, model: UNetModel, denoiser: UNet, settings: Settings, prompts: list[list[str]],
        kept: list[str],
    ):  # fmt: skip
        self.model, self.denoiser, self.settings = model, denoiser, settings
        self.contexts = [model.encode_all(texts) for texts in prompts]  # [N, T, D] each
        self.kept = model.encode_all(kept)
        layers = cross_attention_layers(denoiser, model.family)
        self.layers = {layer.name: layer for layer in layers}
        self._text_inputs: LayerInputs | None = None

    def record_queries(self, prompts: list[list[str]], on_batch: Callable[[], None]) -> None:
        """Sample images of each patch's prompts and, last, of kept ones."""
        empty, side = self._encode(""), self.model.family.resolution // 8
        *self.queries, kept = [
            record_queries(
                self.denoiser, self.model.family, [self._encode(text) for text in texts], empty,
                self.settings, side, AT_ONCE, on_batch,
            )
            for texts in prompts
        ]  # fmt: skip
        self.kept_outputs = KeptSentences(self.kept, [kept, *self.queries], self.settings)

    def of(self, name: str) -> LayerInputs:
        """What the layer of that name reads."""
        weights = self.settings.preserve, self.settings.damping
        if not name.endswith(OUTPUT):
            if self._text_inputs is None:  # the same for all keys and values
                # BOS is the same in every prompt: it belongs to what is kept.
                rows = [context[:, 1:].flatten(0, 1).float().cpu() for context in self.contexts]
                self._text_inputs = layer_inputs(rows, self.kept.flatten(0, 1).cpu(), *weights)
            return self._text_inputs
        layer, rows = self.layers[name.removesuffix(".to_out.0")], []
        for context, queries in zip(self.contexts, self.queries):
            recorded = queries[layer.name]
            recorded = recorded[torch.arange(len(context)) % len(recorded)]
            rows.append(read_out(layer, recorded, context).flatten(0, 1).cpu())
        return layer_inputs(rows, self.kept_outputs.rows(layer).cpu(), *weights)

    def _encode(self, text: str) -> Text:
        return self.model.encode(Prompt(text, text))
