"""Re-read, this pack's closed form: prompts are read as if the concept were not in them.

UCE's ridge regression, moved from single tokens to what a layer reads out of whole prompts at the
queries of real drawings. ``docs/methods/reread.md`` derives it and reports what else was tried.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ...closed_form.input_edit import Changes
from ...closed_form.nearest import nearest_kept
from ...concepts.concept import Concept
from ...concepts.keep_list import keep_for
from ...concepts.prompt_templates import PLACEHOLDER, blanked, kept_sentences, sentences, together
from ...errors import NonFiniteLoss
from ...models.interface import Text, UNet, UNetModel
from ...patches.patch import ForgetPatch
from ...patches.task import Task, method_run
from ...training.run import TrainingOptions
from .adversarial_training import train_adversarially
from .recorded import recorded_patch
from .regression import both_sides, closed_form
from .regression_data import QuerySampler, SentencePairs
from .settings import Settings
from .training_images import AT_ONCE, draw_scenes

TITLE = "Re-read"
REVISION = 4
ABOUT = (
    "Re-read, this pack's own closed form: makes cross-attention read prompts as if the "
    "concept were not in them, and other prompts as before. Trains only with robust_steps."
)
TRANSFORMERS = True
ADVERSARY = "a a"  # as long as the words that an adversary learns
BLANKS = 4  # prompts for adversaries' words, beside the concept's own

PRESETS = {
    "reread": Settings(),
    "reread-quick": Settings(
        prompts=10, keep_prompts=64, near_words=0, words_per_prompt=4, images_per_concept=1,
        sampling_steps=2, guidance=1.0, query_positions=24,
    ),
    "reread-auto": Settings(overshoot=1.0, overshoot_style=1.0, stop_at=0.03),
    "reread-robust": Settings(
        overshoot=0.7, overshoot_style=1.2, prompts=10, near_words=0, robust_steps=300
    ),
}  # fmt: skip


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Solve for a patch, and train it further if asked for; see ``methods.forget``.

    The record's losses are what is left of the concept in what the layers read, their mean of
    |W' o - W o*|^2 / |W o - W o*|^2: 1 at first, and overshoot^2 where nothing holds it back. Those
    of adversarial training follow.
    """
    model, concepts, settings = task.model, task.concepts, task.settings
    options.check_steps(settings.robust_steps * len(concepts))  # before any work
    kept = kept_texts(model, concepts, task.keep, settings)
    if not model.family.known:
        return recorded_patch(task, kept)
    pairs = [sentences(concept, settings.prompts) for concept in concepts]
    styles = [concept.name for concept in concepts if concept.kind == "style"]
    overshoots = [
        settings.overshoot_style if concept.kind == "style" else settings.overshoot
        for concept in concepts
    ]
    with network(model, settings) as denoiser:
        lists = [*both_sides(pairs), kept]
        counts = len(concepts), len(styles)
        sampler = QuerySampler(model, denoiser, settings, task.on_step, lists, *counts)
        texts = None
        if settings.robust_steps:
            texts = _training_texts(sampler, concepts, pairs, kept, styles)
        changes, left = closed_form(sampler, pairs, kept, overshoots)

        def make_patch(changes: Changes, losses: Sequence[float] = ()) -> ForgetPatch:
            return task.patch(changes, [1.0, left, *losses])

        if not texts:
            return make_patch(changes)
        on_batch = partial(sampler.progress, 0.0)
        scenes = draw_scenes(denoiser, *texts, sampler.empty, settings, sampler.side, on_batch)
        try:
            training = train_adversarially(
                task, options, denoiser, changes, *scenes, sampler.empty, make_patch
            )
        except NonFiniteLoss as error:  # in the first steps: only the closed form can be rescued
            error.patch = make_patch(changes)
            raise
    return training.finish()


def network(model: UNetModel, settings: Settings) -> AbstractContextManager[UNet]:
    """The U-Net to draw with, and to train if the settings ask for it."""
    if settings.robust_steps:
        return model.borrow_denoiser()
    # With guidance each picture has two rows.
    return model.watch(2 * AT_ONCE, (settings.size or model.family.resolution) // 8)


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


def kept_texts(
    model: Any, concepts: Sequence[Concept], keep: Sequence[str], settings: Settings
) -> list[str]:
    """The empty prompt, sentences of shipped words, and the user's words and prompts."""
    if not settings.preserve:
        return [""]
    words = keep_for(concepts, (), settings.keep_list)
    known = model.family.known
    count = settings.near_words if known else settings.transformer_near_words
    near = nearest_kept(model, concepts, count)
    styles = keep_for(concepts, (), "styles")
    groups = together(words, settings.words_per_prompt)
    prompts = kept_sentences(groups, styles, settings.keep_prompts)
    prompts += kept_sentences(near, styles, settings.near_prompts * len(near))[1:]
    return [*prompts, *keep_for(concepts, keep, "none")]
