"""Re-read, this pack's closed form: prompts are read as if the concept were not in them.

UCE's ridge regression, moved from single tokens to what a layer reads out of whole prompts at the
queries of real drawings. ``docs/methods/reread.md`` derives it and tells what else was tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...closed_form.input_edit import finished, preserve, rank_setting
from ...closed_form.text_embeddings import keep_list_setting
from ...concepts.concept import Concept
from ...concepts.keep_list import keep_for
from ...concepts.prompt_templates import PLACEHOLDER, blanked, kept_sentences, sentences, together
from ...errors import NonFiniteLoss
from ...linalg import exact, gram, truncate
from ...models.interface import Model
from ...patches.patch import MAX_RANK, ForgetPatch
from ...progress import OnStep, ignore
from ...settings import Settings as Base
from ...settings import checkpointing, lr, seed, setting, size
from ...training.run import Task, TrainingOptions
from .adversarial_training import train_adversarially
from .attention_output import cross_attention_layers
from .regression_data import Drawings, Kept, Reading
from .residual import Remaining
from .training_images import draw_scenes

TITLE = "Re-read"
ABOUT = (
    "Re-read, this pack's own closed form: makes cross-attention read prompts as if the concept "
    "were not in them, and leaves what it reads out of other prompts. Trains only if asked to."
)
PUSH_STEP = 0.2
ADVERSARY = "a a"  # as long as the words that an adversary learns
BLANKS = 4  # sentences in which adversaries' words are met, beside the concept's own


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
    preserve: float = preserve(10.0)
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
    model: Model,
    concepts: Sequence[Concept],
    settings: Settings = Settings(),
    on_step: OnStep = ignore,
    keep: Sequence[str] = (),
    options: TrainingOptions = TrainingOptions(),
) -> ForgetPatch:
    """Solve for a patch, and train it further if asked for; see ``methods.forget``.

    The record's losses are what is left of the concept in what the layers read, their mean of
    |W' o - W o*|^2 / |W o - W o*|^2: 1 at first, and push^2 where nothing holds it back. Those of
    adversarial training follow.
    """
    task = Task.of(model, concepts, settings)
    spoken = [sentences(concept, settings.prompts) for concept in concepts]
    kept = kept_texts(concepts, keep, settings)
    options.check_steps(settings.robust_steps * len(concepts))  # before any work
    with model.borrow_denoiser() as denoiser:
        styles = [concept.name for concept in concepts if concept.kind == "style"]
        draw = Drawings(model, denoiser, settings, on_step, spoken, kept, len(styles))
        pushes = [
            settings.overshoot_style if concept.kind == "style" else settings.overshoot
            for concept in concepts
        ]
        texts = _training_texts(draw, concepts, spoken, kept) if settings.robust_steps else None
        changes, left = closed_form(draw, spoken, kept, pushes)

        def make_patch(changes, losses=()):
            losses = [1.0, left, *losses]
            return finished(model, task.fingerprint, concepts, settings, changes, losses)

        if not texts:
            return make_patch(changes)
        on_batch = partial(draw.progress, 0.0)
        scenes = draw_scenes(denoiser, *texts, draw.empty, settings, draw.side, on_batch)
        try:
            training = train_adversarially(
                task, options, denoiser, changes, *scenes, draw.empty, make_patch, on_step
            )
        except NonFiniteLoss as error:  # in the first steps: only the closed form can be rescued
            error.patch = make_patch(changes)
            raise
    return training.finish()


def _training_texts(draw, concepts, spoken, kept):
    """What ``draw_scenes`` needs: of each concept, kept ones, and these in each style that goes.

    Raises:
        ForgetError: a prompt is too long, also with the adversaries' words in the name's place.
    """
    blanks = [blanked(concept, BLANKS) for concept in concepts]
    for text in dict.fromkeys(text for own in blanks for text in own):
        draw.encoded_one(text.replace(PLACEHOLDER, ADVERSARY))
    own = [(*map(draw.encoded, zip(*pairs)), one) for pairs, one in zip(spoken, blanks)]
    styles = [concept.name for concept in concepts if concept.kind == "style"]
    styled = [draw.encoded([f"{text}, {name}" for text in kept]) for name in styles]
    return own, draw.encoded(kept), styled


@torch.no_grad()
def closed_form(draw, spoken, kept, pushes):
    """What the regression gives: layer name -> (up, down) on the CPU, and what is left."""
    model, denoiser, settings = draw.model, draw.denoiser, draw.settings
    *drawn, of_kept = draw(*draw.sides(spoken), kept)
    readings = [
        Reading.of(model, pairs, first, second)
        for pairs, first, second in zip(spoken, drawn[::2], drawn[1::2])
    ]
    stay = Kept(model.encode_all(kept), [of_kept, *(r.queries for r in readings)], settings)
    problems = (
        Problem(
            f"{layer.name}.to_out.0",
            exact(denoiser.module(f"{layer.name}.to_out.0").weight.detach()),
            [reading.rows(layer) for reading in readings],
            stay.rows(layer),
        )
        for layer in cross_attention_layers(denoiser, model.family)
    )
    if settings.stop_at:
        problems = list(problems)
        pushes = far_enough(draw, problems, spoken, pushes)
    changes, left = {}, []
    for problem in problems:
        up, down = solve(problem.weight, problem.read, problem.kept, settings, pushes)
        changes[problem.name] = up.float().cpu(), down.float().cpu()
        left.append(_left(problem.weight, up, down, problem.read))
        draw.progress(sum(left) / len(left))
    return changes, sum(left) / len(left)


class Problem(NamedTuple):
    """What a layer's change is solved from: its name, W, (o, o*) of each concept, kept rows."""

    name: str
    weight: torch.Tensor
    read: list
    kept: torch.Tensor


def far_enough(draw, problems, spoken, limits):
    """For each concept the least push, in steps of ``PUSH_STEP`` up to its limit, that is enough.

    That is where at most ``settings.stop_at`` of it remains, or the last step took less than that;
    see ``Remaining``. Each concept is judged with all the others at what they have reached.
    """
    enough, remaining = draw.settings.stop_at, [Remaining(draw, pairs) for pairs in spoken]
    pushes, going = [0.0] * len(limits), list(range(len(limits)))
    shares = dict.fromkeys(going, math.inf)
    while going:
        changes = {
            each.name: solve(each.weight, each.read, each.kept, draw.settings, pushes)
            for each in problems
        }
        before, shares = shares, {i: remaining[i](changes) for i in going}
        going = [
            i
            for i in going
            if shares[i] > enough and before[i] - shares[i] >= enough and pushes[i] < limits[i]
        ]
        for i in going:
            pushes[i] = min(pushes[i] + PUSH_STEP, limits[i])
    return pushes


def solve(weight, read, kept, settings, pushes=None):
    """The best change of rank r of a layer that maps W o to W o + (1 + push) (W o* - W o).

    It minimises, over concepts of n pairs (o, o*) each and m kept rows k,

        sum_concepts mean |dW o - (1 + push) W (o* - o)|^2 + p mean |dW k|^2 + l t |dW|^2

    with t the mean eigenvalue of the rest's S = sum mean o o^T + p mean k k^T. Without a bound on
    the rank that is dW = W Z S^-1, Z = (1 + push) sum mean (o* - o) o^T, as in UCE. The best of
    rank r is the r leading singular parts of dW L, S = L L^T, times L^-1 (reduced-rank regression,
    Izenman 1975).

    Args:
        weight: W [out, C], float64. read: (o, o*) of each concept, [n, C]. kept: [m, C].
        pushes: of each concept; None takes ``settings.overshoot`` for all.

    Returns:
        up [out, r], down [r, C]
    """
    system = settings.preserve * gram(kept) / max(1, len(kept))
    towards = torch.zeros_like(system)
    for (concept, other), push in zip(read, pushes or [settings.overshoot] * len(read)):
        system += gram(concept) / len(concept)
        towards += (1 + push) * (other - concept).mT @ concept / len(concept)
    mean = system.trace() / len(system)
    system += settings.damping * mean * torch.eye(len(system)).to(system)
    root = torch.linalg.cholesky(system)
    # dW L = W Z L^-T
    change = torch.linalg.solve_triangular(root, towards.mT @ weight.mT, upper=False).mT
    up, down, _ = truncate(change, min(settings.rank * len(read) or MAX_RANK, MAX_RANK))
    return up, torch.linalg.solve_triangular(root, down, upper=False, left=False)


def _left(weight, up, down, read):
    """Mean over concepts of |W' o - W o*|^2 / |W o - W o*|^2."""
    shares = []
    for concept, other in read:
        before = (concept - other) @ weight.mT
        after = before + concept @ down.mT @ up.mT
        shares.append(float(after.square().sum() / before.square().sum()))
    return sum(shares) / len(shares)


def kept_texts(concepts, keep, settings):
    """What is to stay: the empty prompt, sentences of shipped words, and what the user gave."""
    if not settings.preserve:
        return [""]
    words = keep_for(concepts, (), settings.keep_list)
    styles = keep_for(concepts, (), "styles")
    words = together(words, settings.words_per_prompt)
    return [
        *kept_sentences(words, styles, settings.keep_prompts),
        *keep_for(concepts, keep, "none"),
    ]
