"""Re-read in the text encoder: a hundred concepts and more in one patch of bounded rank.

What cross-attention reads has too few dimensions to move a hundred concepts by one linear map and
leave the rest (``docs/methods/reread_text.md``). A text encoder tells words apart before it mixes
them, and is not linear. So low-rank changes of all its layers are trained until it gives, for a
sentence with a concept, what it gave for the same sentence without it. The U-Net is not run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..closed_form.input_edit import weight_gram
from ..concepts.keep_list import keep_for
from ..concepts.prompt_templates import kept_sentences, sentences, styled_sentences
from ..models.adapters import Switch, attached
from ..models.families import UNetFamily, text_layers
from ..models.interface import Text, TextEncoder, UNet
from ..models.token_positions import EOS_ID
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..sequences import evenly
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..training.fit_adapters import make_adapters
from ..training.loop import AdamWConfig
from ..training.run import TrainingOptions, TrainingRun
from . import shared_settings as shared

TITLE = "Re-read, text encoder"
REVISION = 2
ABOUT = (
    "Re-read for many concepts at once: trains the text encoder to encode sentences with a "
    "concept as if it were not in them, and others as before. The patch is for the CLIP."
)
AT_ONCE = 64  # sentences that are encoded together
MEASURED = 2048  # pairs of a long list that tell how far pairs are apart
MARGIN = 8  # positions of padding that are trained on behind the longest sentence
FAINT = 0.05  # pairs that differ less than this share of the mean count as if they differed so much


@dataclass(frozen=True)
class Settings(Base, method="reread_text"):
    trains = True
    steps: int = setting(
        1500,
        "Training steps in total, for any number of concepts. More forget more and harm less.",
        limits=(1, 100_000),
    )
    lr: float = shared.lr(8e-3, "AdamW's learning rate at the start; it falls to zero.")
    rank: int = shared.rank(default=32)
    batch: int = advanced(
        32,
        "Sentences with a concept in each step, and as many kept ones. Smaller is faster and "
        "noisier.",
        limits=(1, 1024),
    )
    preserve: float = shared.preserve(default=2.0)
    prompts: int = advanced(
        12,
        "Sentences with each name, from a fixed list; as many with styles, and its own "
        "prompts, are added.",
        limits=(1, 180),
    )
    keep_prompts: int = advanced(
        1500,
        "Sentences with kept words. More do less harm. Half of a step's kept sentences use "
        "what is connected to keep, if anything is.",
        limits=(0, 10_000),
        formerly="kept",
    )
    keep_list: str = shared.keep_list()
    seed: int = shared.seed()


PRESETS = {"reread-many": Settings()}


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Train a patch of the text encoder; see ``methods.forget``."""
    model, settings, texts = task.model, task.settings, _texts(task)
    options.check_steps(settings.steps)  # before any work
    with model.watch() as denoiser:
        metric = read_metric(denoiser, model.family)
    names = read_layers(model.family)
    with model.borrow_text_encoder(words=False) as encoder:
        adapters, module = make_adapters(encoder, names, settings), encoder.module(names[0])
        config = AdamWConfig(settings.lr, weight_decay=0.0, linear_decay=True)
        with attached(adapters, encoder.module) as switch:
            lessons = Lessons(encoder, switch, *texts, metric, settings)
            for _ in range(options.batches_drawn):
                lessons.pick()
            training = TrainingRun(task, adapters, switch, options, config, settings.steps, module)
            training.train(lessons, task.on_step)
    return training.finish()


def read_layers(family: UNetFamily) -> list[str]:
    """Names of the text encoders' layers, but for the block that the U-Net does not read: of two
    encoders, the first's last."""
    unread = f"text_encoder.text_model.encoder.layers.{family.texts[0].blocks - 1}."
    names = [layer.name for layer in text_layers(family)]
    return [name for name in names if len(family.texts) == 1 or not name.startswith(unread)]


def _texts(task: Task) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Pairs of sentences with and without a concept, kept sentences, and those of given words."""
    concepts, settings = task.concepts, task.settings
    styles, given = keep_for(concepts, (), "styles"), keep_for(concepts, task.keep, "none")
    pairs = []
    for concept in concepts:
        pairs += sentences(concept, settings.prompts)
        # Beside a given word, too: else that word shelters the concept.
        for beside in (styles, given):
            pairs += styled_sentences(concept, beside, settings.prompts)
    if not settings.preserve:
        return pairs, [""], []
    kept = kept_sentences(task.kept_words(), styles, settings.keep_prompts)
    # Given words may be styles, and then stand behind the other given words too.
    sentences_of_given = kept_sentences(given, [*given, *styles], settings.prompts * len(given))
    return pairs, kept, [*given, *sentences_of_given[1:]]


def read_metric(denoiser: UNet, family: UNetFamily) -> Tensor:
    """R [D, D], float32: |c R|^2 is the mean square of what keys and values make of a context c.

    An error that no layer reads counts nothing.
    """
    values, vectors = torch.linalg.eigh(weight_gram(denoiser, family))
    values = values.clamp(min=0) / values.clamp(min=0).sum()
    return (vectors * values.sqrt()).float()


class Lessons:
    """The loss of each step; use while the adapters are attached.

    For a sentence a with a concept, b the same without it, and a kept sentence k, with E what the
    frozen encoder gives and E' the one in training, in the metric R of what the U-Net reads:

        |E'(a) - E(b)|^2 / |E(a) - E(b)|^2  +  p |E'(k) - E(k)|^2 / mean |E(a) - E(b)|^2

    averaged over a batch. What the frozen encoder gives is encoded once and stored, or, where a
    list is so long that a run draws less than all of it, anew for each step.

    Args:
        switch: of the adapters in training.
        metric: of ``read_metric``.
        pairs: [(a, b)].
        kept, given: texts k; half of those of a batch come from ``given``, if any.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        switch: Switch,
        pairs: Sequence[tuple[str, str]],
        kept: Sequence[str],
        given: Sequence[str],
        metric: Tensor,
        settings: Settings,
    ):
        self.encoder, self.switch, self.settings = encoder, switch, settings
        self.metric = metric.to(encoder.device)
        texts = [text for text, _ in pairs], [other for _, other in pairs], [*kept, *given]
        ids = [encoder.ids_of(some) for some in texts]
        ends = max(int((some == EOS_ID).int().argmax(2).max()) for some in ids)  # the first EOT
        length = min(ends + 1 + MARGIN, ids[0].shape[2])
        self.concept, self.others, self.kept = (some[..., :length] for some in ids)
        self.first_given = len(kept)
        stored = len(pairs) <= settings.steps * settings.batch
        count = len(pairs) if stored else min(MEASURED, len(pairs))
        some = torch.tensor(evenly(range(len(pairs)), count))
        before, targets = self._frozen(self.concept[some]), self._frozen(self.others[some])
        distances = [(one - other).square().sum(1).mean() for one, other in zip(before, targets)]
        # Pooled text counts as much as all of the context.
        self.shares = [(distances[0] / distance).sqrt() for distance in distances]
        apart = (self._joined(before) - self._joined(targets)).square().sum(1)
        self.scale = apart.mean()  # mean |E(a) - E(b)|^2
        self.stored = None
        if stored:  # E(b), |E(a) - E(b)|^2 and E(k) of all
            frozen_kept = self._joined(self._frozen(self.kept))
            self.stored = self._joined(targets), self._distances(apart), frozen_kept
        self.generator = torch.Generator().manual_seed(settings.seed)

    def __call__(self, step: int) -> Tensor:
        chosen, kept = self.pick()
        ids = torch.cat([self.concept[chosen], self.kept[kept]])
        encoded = self._joined(self._read(self.encoder.encode_ids(ids)))
        forgotten, preserved = encoded.split(len(chosen))  # E'(a), E'(k)
        targets, distances, frozen_kept = self._of_frozen(chosen, kept)
        left = (forgotten - targets).square().sum(1) / distances
        moved = (preserved - frozen_kept).square().sum(1).mean() / self.scale
        return left.mean() + self.settings.preserve * moved

    def _of_frozen(self, chosen: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E(b), |E(a) - E(b)|^2 and E(k)."""
        if self.stored:
            targets, distances, frozen_kept = self.stored
            return targets[chosen], distances[chosen], frozen_kept[kept]
        ids = self.concept[chosen], self.others[chosen], self.kept[kept]
        before, targets, frozen_kept = (self._joined(self._frozen(some)) for some in ids)
        return targets, self._distances((before - targets).square().sum(1)), frozen_kept

    def _distances(self, apart: Tensor) -> Tensor:
        return apart.clamp(min=FAINT * float(self.scale))

    def pick(self) -> tuple[Tensor, Tensor]:
        """What is random in a step: which pairs, and which kept sentences."""
        count = self.settings.batch
        chosen = torch.randint(len(self.concept), (count,), generator=self.generator)
        kept = torch.randint(self.first_given, (count,), generator=self.generator)
        given = len(self.kept) - self.first_given
        if given:
            half = torch.randint(given, (count // 2,), generator=self.generator)
            kept[: count // 2] = self.first_given + half
        return chosen, kept

    def _frozen(self, ids: Tensor) -> list[Tensor]:
        with self.switch.off(), torch.no_grad():
            parts = [self._read(self.encoder.encode_ids(some)) for some in ids.split(AT_ONCE)]
            return [torch.cat(tensors) for tensors in zip(*parts)]

    def _read(self, text: Text) -> list[Tensor]:
        """The context in the metric, and pooled text where there is some: rows of [N, .]."""
        return [(text.context @ self.metric).flatten(1), *text.vectors.values()]

    def _joined(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([share * some for share, some in zip(self.shares, rows)], 1)
