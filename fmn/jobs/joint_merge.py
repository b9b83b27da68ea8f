"""One patch that does what several do, each on its own prompts; ``patches.joint`` has the maths.

What a layer reads comes from the model at hand: contexts of the patches' prompts, and for
``to_out`` of cross-attention what it reads out of them at the queries of a few drawings.
"""

import torch

from ..closed_form.output_edit import Progress
from ..concepts.concept import Prompt
from ..concepts.concept_list import FIELDS, concept_of
from ..concepts.prompt_templates import sentences
from ..errors import ForgetError
from ..methods.reread.attention_output import cross_attention_layers, read_out, record_queries
from ..methods.reread.method import Settings, kept_texts
from ..methods.reread.regression_data import AT_ONCE, Kept
from ..patches.joint import joint_change, layer_inputs
from ..patches.merge import build_merged, open_patches
from ..settings import PRESERVE
from ..training.fit_adapters import autograd

TEXTS = 40  # prompts of one concept, at most
OUT = ".attn2.to_out.0"


@autograd()
@torch.no_grad()
def fuse(model, sources, preserve=PRESERVE, budget=0, on_step=lambda step: None, keep=()):
    """Solve for the patch; returns a ``merge.Merged``.

    The record's losses are sums over layers of what is minimised, as a share of what it would be
    without any patch: first for the sum of the patches, then for the solution.

    Args:
        model: a ``Model``; it comes back unchanged.
        sources: list of (patch or path of its file, strength).
        preserve: weight of kept prompts. budget: bytes that the file may have; 0: any.
        on_step: gets a ``train.Step`` after each part of the work, and may raise to cancel.
        keep: words or prompts to keep, beside the shipped lists.

    Raises:
        ForgetError: a patch is of another family, does not say what it forgets, or changes layers
            of which this does not know what they read.
    """
    entries = open_patches(sources)
    for patch, _ in entries:
        patch.check_family(model.family)
        _check_layers(patch)
    settings = Settings(preserve=preserve)
    concepts = [_concepts(patch) for patch, _ in entries]
    texts = [_texts(own, settings.prompts) for own in concepts]
    kept = kept_texts(sum(concepts, []), keep, settings)
    names = list(dict.fromkeys(layer.name for patch, _ in entries for layer in patch.layers))
    reads_out = any(name.endswith(OUT) for name in names)
    drawn = [_drawn(own, settings) for own in (*texts, kept)] if reads_out else []
    progress = Progress(on_step, sum(-(-len(own) // AT_ONCE) for own in drawn) + len(names))
    with model.borrow() as borrowed:
        reader = _Reader(model, borrowed, settings, texts, kept)
        if reads_out:
            reader.draw(drawn, lambda: progress(1.0))
        changes, sums = {}, torch.zeros(3, dtype=torch.float64)
        for name in names:
            parts = [
                (strength * patch.changes[name][0].double(), patch.changes[name][1].double())
                if name in patch.changes
                else None
                for patch, strength in entries
            ]
            changes[name], found = joint_change(parts, reader.inputs(name))
            sums += torch.tensor(found, dtype=torch.float64)
            progress(float(sums[1] / sums[2]))
    told = {"how": "joint", "budget": budget, "preserve": preserve, "damping": settings.damping}
    losses = (sums[:2] / sums[2]).tolist()
    return build_merged(entries, changes, told, budget, losses)


def _check_layers(patch):
    for layer in patch.layers:
        if not (layer.is_key_or_value or layer.name.endswith(OUT)):
            raise ForgetError(
                f"The patch for {', '.join(patch.concepts):.80} changes '{layer.name}', and joint "
                "merging only knows what keys, values and outputs of cross-attention read: merge "
                "it with concatenate."
            )


def _concepts(patch):
    """What a patch forgets, by its record, which may be a stranger's."""
    found = [
        concept_of({key: value for key, value in told.items() if key in FIELDS})
        for told in patch.info.get("concepts", [])
    ]
    if not found:
        raise ForgetError(
            "A patch does not say what it forgets, which joint merging has to know: merge it with "
            "concatenate."
        )
    return found


def _texts(concepts, count):
    """Prompts of some concepts: their sentences, and the names alone."""
    found = []
    for concept in concepts:
        own = [*concept.subjects, *(text for text, _ in sentences(concept, count))]
        found += _spread(own, TEXTS)
    return found


def _drawn(texts, settings):
    return _spread(texts, settings.drawn)


def _spread(texts, count):
    """Some of a list's texts, evenly."""
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


class _Reader:
    """What layers read of each patch's prompts, and of kept ones."""

    def __init__(self, model, borrowed, settings, texts, kept):
        self.model, self.borrowed, self.settings = model, borrowed, settings
        self.contexts = [model.encode_all(own) for own in texts]
        self.kept = model.encode_all(kept)
        self.layers = {
            layer.name: layer for layer in cross_attention_layers(borrowed, model.family)
        }
        self._of_text = None

    def draw(self, drawn, on_batch):
        """Record queries: of each patch's drawings, and of kept prompts'."""
        empty, side = self._encoded(""), self.model.family.resolution // 8
        *self.queries, kept = [
            record_queries(
                self.borrowed, self.model.family, [self._encoded(text) for text in own], empty,
                self.settings, side, AT_ONCE, on_batch,
            )
            for own in drawn
        ]  # fmt: skip
        self.stay = Kept(self.kept, [kept, *self.queries], self.settings)

    def inputs(self, name):
        """The ``joint.LayerInputs`` of a layer."""
        weights = self.settings.preserve, self.settings.damping
        if not name.endswith(OUT):
            if self._of_text is None:  # the same for all keys and values
                # BOS is the same in every prompt: it belongs to what stays.
                rows = [own[:, 1:].flatten(0, 1).float().cpu() for own in self.contexts]
                self._of_text = layer_inputs(rows, self.kept.flatten(0, 1).cpu(), *weights)
            return self._of_text
        layer = self.layers[name.removesuffix(".to_out.0")]
        rows = []
        for own, queries in zip(self.contexts, self.queries):
            seen = queries[layer.name]
            seen = seen[torch.arange(len(own)) % len(seen)]
            rows.append(read_out(layer, seen, own).flatten(0, 1).cpu())
        return layer_inputs(rows, self.stay.rows(layer).cpu(), *weights)

    def _encoded(self, text):
        return self.model.encode(Prompt(text, text))
