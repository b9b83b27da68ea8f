"""One patch that does what several do, each on its own prompts; ``patches.joint`` solves it.

The model encodes the patches' prompts, which is what keys and values of cross-attention read. What
its outputs read is computed from them and the queries of a few sampled images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..closed_form.output_edit import PartProgress
from ..concepts.concept import Concept
from ..concepts.concept_list import FIELDS, concept_of
from ..concepts.prompt_templates import sentences
from ..errors import ForgetError
from ..methods.reread.method import Settings, kept_texts, network
from ..methods.reread.regression import both_sides, problems
from ..methods.reread.regression_data import QuerySampler
from ..models.families import cross_attention_names
from ..models.module_patching import autograd
from ..patches.joint import DAMPING, Factors, LayerInputs, joint_change, layer_inputs
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
    settings = Settings(preserve=preserve)
    concepts = [_concepts(patch) for patch, _ in entries]
    kept = kept_texts(model, sum(concepts, []), keep, settings)
    names = list(dict.fromkeys(layer.name for patch, _ in entries for layer in patch.layers))
    with network(model, settings) as denoiser:
        inputs = _Inputs(model, denoiser, settings, concepts, kept, names, on_step)
        changes, sums = {}, torch.zeros(3, dtype=torch.float64)
        for name, of_layer in inputs:
            parts = [_strengthened(patch, name, strength) for patch, strength in entries]
            changes[name], squares = joint_change(parts, of_layer)
            sums += torch.tensor(squares, dtype=torch.float64)
            inputs.progress(float(sums[1] / sums[2]))
    record = {"how": "joint", "budget": budget, "preserve": preserve, "damping": DAMPING}
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


class _Inputs:
    """Goes through layers by name, each with what it reads for every patch and for kept prompts."""

    def __init__(
        self,
        model: UNetModel,
        denoiser: UNet,
        settings: Settings,
        concepts: Sequence[Sequence[Concept]],
        kept: list[str],
        names: Sequence[str],
        on_step: OnStep,
    ):
        self.model, self.settings, self.concepts, self.kept = model, settings, concepts, kept
        self.outputs = [name for name in names if name.endswith(OUTPUT)]
        self.others = [name for name in names if name not in self.outputs]
        self.progress = PartProgress(on_step, len(self.others))
        if self.outputs:
            flat = [concept for some in concepts for concept in some]
            self.pairs = [sentences(concept, settings.prompts) for concept in flat]
            lists = [*both_sides(self.pairs), kept]
            self.sampler = QuerySampler(model, denoiser, settings, on_step, lists)
            self.progress = self.sampler.progress
            unchanged = len(cross_attention_names(model.family)) - len(self.outputs)
            self.progress.total += len(self.others) - unchanged

    def __iter__(self) -> Iterator[tuple[str, LayerInputs]]:
        """``LayerInputs`` by layer: of keys and values, which all read the same, then outputs."""
        if self.others:
            of_text = self._of_text()
            yield from ((name, of_text) for name in self.others)
        if not self.outputs:
            return
        for problem in problems(self.sampler, self.pairs, self.kept):
            if problem.name in self.outputs:
                read = iter(concept for concept, _ in problem.concepts)
                rows = [torch.cat(list(islice(read, len(some)))).cpu() for some in self.concepts]
                yield problem.name, layer_inputs(rows, problem.kept.cpu(), self.settings.preserve)

    def _of_text(self) -> LayerInputs:
        rows = []
        for some in self.concepts:
            contexts = self.model.encode_all(_prompts(some, self.settings.prompts))  # [N, T, D]
            # BOS is the same in every prompt: it belongs to what is kept.
            rows.append(contexts[:, 1:].flatten(0, 1).float().cpu())
        kept = self.model.encode_all(self.kept).flatten(0, 1).cpu()
        return layer_inputs(rows, kept, self.settings.preserve)


def _prompts(concepts: Sequence[Concept], count: int) -> list[str]:
    """Names and sentences of each concept, at most ``MAX_PROMPTS``."""
    texts = ([*c.subjects, *(text for text, _ in sentences(c, count))] for c in concepts)
    return [text for some in texts for text in evenly(some, min(MAX_PROMPTS, len(some)))]
