"""Re-read, this pack's closed form: prompts are read as if the concept were not in them.

UCE's ridge regression, moved from single tokens to what a layer reads out of whole prompts at the
queries of real drawings. ``docs/methods/reread.md`` derives it and reports what else was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...closed_form.input_edit import Changes, preserve_setting, rank_setting, solved_patch
from ...closed_form.text_embeddings import keep_list_setting
from ...concepts.concept import Concept
from ...concepts.keep_list import keep_for
from ...concepts.prompt_templates import PLACEHOLDER, blanked, kept_sentences, sentences, together
from ...errors import NonFiniteLoss
from ...progress import OnStep, ignore
from ...settings import Settings as Base
from ...settings import checkpointing, lr, seed, setting, size
from ...training.run import Task, TrainingOptions
from .adversarial_training import train_adversarially
from .regression import both_sides, closed_form
from .regression_data import QuerySampler, SentencePairs
from .training_images import draw_scenes

if TYPE_CHECKING:
    from ...models.interface import Text, UNetModel
    from ...patches.patch import ForgetPatch

TITLE = "Re-read"
REVISION = 1
ABOUT = (
    "Re-read, this pack's own closed form: makes cross-attention read prompts as if the concept "
    "were not in them, and leaves what it reads out of other prompts. Trains only if asked to."
)
ADVERSARY = "a a"  # as long as the words that an adversary learns
BLANKS = 4  # prompts for adversaries' words, beside the concept's own


@dataclass(frozen=True)
class Settings(Base, method="reread"):
    overshoot: float = setting(
        0.4,
        "How far beyond, but for styles. 0: prompts are read as if the concept were not there. 1: "
        "as much to the other side. Higher: it goes more surely, and neighbours suffer more.",
        low=0.0,
        high=4.0,
        step=0.01,
        formerly="push",
    )
    overshoot_style: float = setting(
        0.7,
        "The same for styles, which need more: asked for none, a model draws one anyway.",
        low=0.0,
        high=4.0,
        step=0.01,
        formerly="push_style",
    )
    stop_at: float = setting(
        0.0,
        "Go no further than needed: overshoot is raised in steps until at most this share of what "
        "the concept does to a drawing's first predictions is left, or a step takes less of it "
        "than that. 0: always as far as overshoot says.",
        low=0.0,
        high=1.0,
        step=0.01,
        advanced=True,
    )
    preserve: float = preserve_setting(10.0)
    damping: float = setting(
        1e-3,
        "Weight of leaving all as it is (lambda), as a share of the mean square of what is read. "
        "Small: a stronger edit. Large: none.",
        low=1e-9,
        high=1e6,
        step=0.0001,
        advanced=True,
    )
    prompts: int = setting(
        10,
        "Sentences with each name of the concept, from a fixed list; its own prompts come on top.",
        low=1,
        high=180,
        advanced=True,
    )
    keep_prompts: int = setting(
        256,
        "Sentences with kept words. More: less harm, and longer to encode. Each word and prompt "
        "that is connected to keep comes on top.",
        low=0,
        high=10_000,
        advanced=True,
        formerly="kept",
    )
    words_per_prompt: int = setting(
        1,
        "Kept words in each of these sentences. 1: as many words as sentences are kept. More: "
        "fewer sentences do for a list, which are what takes long to encode.",
        low=1,
        high=6,
        advanced=True,
        formerly="together",
    )
    images_per_concept: int = setting(
        4,
        "How many prompts of each concept are drawn, beside as many without it and as many kept "
        "ones, to see where cross-attention looks.",
        low=1,
        high=64,
        advanced=True,
        formerly="drawn",
    )
    sampling_steps: int = setting(
        4, "Steps in which each is drawn.", low=1, high=1000, advanced=True
    )
    guidance: float = setting(
        3.5,
        "Guidance scale while drawing. 1: none, half the time.",
        low=1.0,
        high=100.0,
        step=0.1,
        advanced=True,
    )
    query_positions: int = setting(
        8,
        "Places of each picture and step whose queries are used.",
        low=1,
        high=1024,
        advanced=True,
        formerly="places",
    )
    rank: int = rank_setting(8, advanced=True)
    robust_steps: int = setting(
        0,
        "Training steps for each concept against attacks, after the closed form. 0: none, the "
        "patch is made in a moment. 300: learned words bring the concept back less often; takes "
        "far longer and costs some of what is kept.",
        low=0,
        high=100_000,
        group="robust",
    )
    robust_overshoot: float = setting(
        3.0,
        "With robust_steps: how far predictions are moved away from the concept. 0: as if it were "
        "not in the prompt. Higher: it stays away more surely, and neighbours suffer more.",
        low=0.0,
        high=20.0,
        step=0.1,
        advanced=True,
        group="robust",
        formerly="robust_push",
    )
    robust_preserve: float = setting(
        1.5,
        "With robust_steps: weight of kept prompts against what is forgotten. 0: none.",
        low=0.0,
        high=1000.0,
        step=0.1,
        advanced=True,
        group="robust",
    )
    robust_rank: int = setting(
        3,
        "With robust_steps: rank of the change of self-attention and feed-forward layers.",
        low=1,
        high=128,
        advanced=True,
        group="robust",
    )
    robust_pictures: int = setting(
        24,
        "With robust_steps: pictures drawn of each concept, and twice as many of kept prompts.",
        low=1,
        high=1000,
        advanced=True,
        group="robust",
    )
    robust_lr: float = lr(
        2e-3,
        "With robust_steps: AdamW's learning rate at the start.",
        advanced=True,
        group="robust",
    )
    checkpointing: bool = checkpointing()
    keep_list: str = keep_list_setting()
    size: int = size()
    seed: int = seed()

    @property
    def trains(self) -> bool:  # type: ignore[override]
        return self.robust_steps > 0


PRESETS = {
    "reread": Settings(),
    "reread-quick": Settings(
        keep_prompts=64,
        words_per_prompt=4,
        images_per_concept=1,
        sampling_steps=2,
        guidance=1.0,
        query_positions=24,
    ),
    "reread-auto": Settings(overshoot=1.0, overshoot_style=1.0, stop_at=0.03),
    "reread-robust": Settings(overshoot=0.7, overshoot_style=1.2, robust_steps=300),
}


def run(
    model: UNetModel,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
    options: TrainingOptions = TrainingOptions(),
) -> ForgetPatch:
    """Solve for a patch, and train it further if asked for; see ``methods.forget``.

    The record's losses are what is left of the concept in what the layers read, their mean of
    |W' o - W o*|^2 / |W o - W o*|^2: 1 at first, and overshoot^2 where nothing holds it back. Those
    of adversarial training follow.
    """
    task = Task.of(model, concepts, settings)
    pairs = [sentences(concept, settings.prompts) for concept in concepts]
    kept = kept_texts(concepts, keep, settings)
    options.check_steps(settings.robust_steps * len(concepts))  # before any work
    styles = [concept.name for concept in concepts if concept.kind == "style"]
    overshoots = [
        settings.overshoot_style if concept.kind == "style" else settings.overshoot
        for concept in concepts
    ]
    with model.borrow_denoiser() as denoiser:
        lists = [*both_sides(pairs), kept]
        counts = len(concepts), len(styles)
        sampler = QuerySampler(model, denoiser, settings, on_step, lists, *counts)
        texts = None
        if settings.robust_steps:
            texts = _training_texts(sampler, concepts, pairs, kept, styles)
        changes, left = closed_form(sampler, pairs, kept, overshoots)

        def make_patch(changes: Changes, losses: Sequence[float] = ()) -> ForgetPatch:
            losses = [1.0, left, *losses]
            return solved_patch(model, task.fingerprint, concepts, settings, changes, losses)

        if not texts:
            return make_patch(changes)
        on_batch = partial(sampler.progress, 0.0)
        scenes = draw_scenes(denoiser, *texts, sampler.empty, settings, sampler.side, on_batch)
        try:
            training = train_adversarially(
                task, options, denoiser, changes, *scenes, sampler.empty, make_patch, on_step
            )
        except NonFiniteLoss as error:  # in the first steps: only the closed form can be rescued
            error.patch = make_patch(changes)
            raise
    return training.finish()


def _training_texts(
    sampler: QuerySampler,
    concepts: Sequence[Concept],
    pairs: Sequence[SentencePairs],
    kept: Sequence[str],
    styles: Sequence[str],
) -> tuple[list[Any], Text, list[Text]]:
    """The texts of ``draw_scenes``: of each concept, kept ones, and these in each style to forget.

    Raises:
        ForgetError: a prompt is too long, also with the adversaries' words in the name's place.
    """
    blanks = [blanked(concept, BLANKS) for concept in concepts]
    for text in dict.fromkeys(text for texts in blanks for text in texts):
        sampler.encode(text.replace(PLACEHOLDER, ADVERSARY))
    texts = [
        (*map(sampler.encode_some, zip(*some)), prompts) for some, prompts in zip(pairs, blanks)
    ]
    styled = [sampler.encode_some([f"{text}, {style}" for text in kept]) for style in styles]
    return texts, sampler.encode_some(kept), styled


def kept_texts(concepts: Sequence[Concept], keep: Sequence[str], settings: Settings) -> list[str]:
    """The empty prompt, sentences of shipped words, and the user's words and prompts."""
    if not settings.preserve:
        return [""]
    words = keep_for(concepts, (), settings.keep_list)
    styles = keep_for(concepts, (), "styles")
    groups = together(words, settings.words_per_prompt)
    prompts = kept_sentences(groups, styles, settings.keep_prompts)
    return [*prompts, *keep_for(concepts, keep, "none")]
