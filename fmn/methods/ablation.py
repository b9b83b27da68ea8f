"""Concept Ablation (Kumari et al. 2023, arXiv 2303.13516), also for correction.

The prediction for a concept's prompt is trained towards the one for its anchor's. What the paper
leaves open is taken from the released code, nupurkmr9/concept-ablation diffusers/train.py.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch

from ..closed_form.protected_subspace import protected_downs
from ..concepts.concept import Concept, Prompt
from ..concepts.keep_list import keep_for
from ..concepts.prompt_templates import PLACEHOLDER
from ..errors import ForgetError
from ..models.adapters import Switch
from ..models.attention_maps import ProbeInput, concept_flags
from ..models.families import layers as layers_of
from ..models.interface import Denoiser, Model, Text, UNetModel
from ..models.sampling import DRAWN_AT_ONCE, drawn, seeded_noise
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..training.fit_adapters import (
    Draw,
    LossOf,
    in_scope,
    noise_one,
    reference_latents,
    shuffled_cycle,
    train_patch,
)  # fmt: skip
from ..training.losses import concept_ablation
from ..training.run import TrainingOptions
from . import shared_settings as shared

TITLE = "Concept Ablation"
REVISION = 2
ANY_MODEL = True
ABOUT = (
    "Concept Ablation (arXiv 2303.13516): trains the concept's prompts to draw what its anchor's "
    "prompts draw; also corrects what a word means."
)


@dataclass(frozen=True)
class Settings(Base, method="ablation"):
    trains = True
    steps: int = shared.steps(default=50)
    lr: float = shared.lr(
        2e-3,
        "AdamW's learning rate. Around 0.002 for low rank; the released code trains full weights "
        "with 0.000008.",
    )
    rank: int = shared.rank(advanced=True)
    layers: str = advanced(
        "kv",
        "What is trained. kv: keys and values of cross-attention. attention: all of "
        "cross-attention. unet: every linear and convolution layer.",
        choices=("kv", "attention", "unet"),
    )
    full_weights: bool = shared.full_weights()
    target: str = advanced(
        "model",
        "What the concept's prompt learns to predict. model: what the model predicts for the "
        "anchor's prompt. noise: the true noise on the anchor's pictures.",
        choices=("model", "noise"),
    )
    teacher: str = advanced(
        "frozen",
        "Who predicts for the anchor, if target is 'model'. frozen: the model before training. "
        "current: the model in training, as released; the anchor may drift along.",
        choices=("frozen", "current"),
    )
    no_anchor: str = advanced(
        "rest",
        "What stands for the anchor of concepts without one. empty: the empty prompt. rest: the "
        "same prompt without the concept's words.",
        choices=("empty", "rest"),
    )
    references: str = setting(
        "samples",
        "What is noised. samples: pictures that the model draws of the anchor first. pictures: "
        "those on the concept, which must show what is drawn instead. zeros: nothing, fastest.",
        choices=("samples", "pictures", "zeros"),
    )
    samples: int = setting(
        4,
        "How many pictures of each anchor prompt, if references is 'samples'. More cover more, "
        "and take longer to draw.",
        limits=(1, 1000),
    )
    sample_steps: int = advanced(20, "Sampling steps of those pictures.", limits=(1, 1000))
    guidance: float = advanced(
        5.0, "Guidance of those pictures. 1: none.", limits=(0.0, 100.0, 0.1)
    )
    prior: float = advanced(
        0.0,
        "Weight of drawing the anchor itself as in its pictures. 0: off. Higher: the concept "
        "moves less.",
        limits=(0.0, 1000.0, 0.01),
    )
    preserve: float = setting(
        1.0,
        "Weight of the words to keep, if any are given. 0: none may be given. Higher: they "
        "change less. Steps take about twice as long with them.",
        limits=(0.0, 1000.0, 0.01),
    )
    detach_start: bool = advanced(
        True,
        "On: the start token's key and value get no gradient, as released. It is in every "
        "prompt, so this protects the others.",
    )
    batch: int = advanced(
        4,
        "Prompts a step. 4 as released; more are steadier, slower and need more memory.",
        limits=(1, 64),
    )
    size: int = shared.size()
    checkpointing: bool = shared.checkpointing()
    seed: int = shared.seed()
    protect: bool = shared.protect()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.references == "zeros" and (self.target == "noise" or self.prior):
            what = "target 'noise'" if self.target == "noise" else f"prior {self.prior:g}"
            raise ForgetError(
                f"{what} learns from pictures and references 'zeros' has none: use references "
                "'samples' or 'pictures', or target 'model' with prior 0."
            )


PRESETS = {
    "ablation": Settings(),
    "ablation-released": Settings(
        steps=200, lr=8e-6, rank=64, full_weights=True, teacher="current", no_anchor="rest",
        samples=5, sample_steps=25, guidance=6.0,
    ),
}  # fmt: skip
KEEP_LOSS = Settings(target="model", teacher="frozen", prior=0.0)  # of words to keep


class Pair(NamedTuple):
    """A prompt of a concept beside its anchor's, encoded, and latents of the anchor."""

    target: Text  # [1, T, D]
    anchor: Text  # [1, T', D]
    latents: torch.Tensor  # [N, C, h, w]


def prompt_pairs(concept: Concept, no_anchor: str = "empty") -> list[tuple[Prompt, Prompt]]:
    """Each training prompt of a concept with its anchor's.

    Args:
        no_anchor: for a concept without an anchor, ``empty``: the empty prompt; ``rest``: the
            same prompt without the concept's words, as the released code pairs styles.
    """
    if concept.anchor or no_anchor == "empty":
        return [
            (prompt, Prompt(text, concept.anchor, prompt.plain))
            for prompt, text in concept.anchored_prompts()
        ]
    marked = replace(concept, anchor=PLACEHOLDER).anchored_prompts()
    return [(prompt, Prompt(_rest(text), "", prompt.plain)) for prompt, text in marked]


MARK = re.escape(PLACEHOLDER)
JOINING = r"in the style of|of|by|with|and"
# Before a noun the words are an attribute of it, as in "a happy dog": only they go.
ATTRIBUTE = re.compile(rf"{MARK}\s+(?!(?:{JOINING}|in|on|at)\b)(?=\w)")
# Else what joined them to the sentence goes too: "a cat and a <*>", "a castle, <*>".
MENTION = re.compile(rf"(?:\s*,)?(?:\s*\b(?:{JOINING}))?(?:\s*\b(?:an?|the))?\s*{MARK}", re.I)
ENDS = re.compile(r"^[\s,]*(?:(?:of|and)\b)?[\s,]+|[\s,]+$", re.I)


def _rest(text: str) -> str:
    """An English prompt without each ``PLACEHOLDER`` and the words that go with it."""
    text = MENTION.sub("", ATTRIBUTE.sub("", text))
    return ENDS.sub("", re.sub(r"\s+", " ", text))


def prepare(model: Model, concept: Concept, settings: Settings) -> list[Pair]:
    """The pairs of a concept.

    Raises:
        ForgetError: references are ``pictures`` and the concept has none, or the VAE is another
            family's.
    """
    pairs = prompt_pairs(concept, settings.no_anchor)
    anchors = dict.fromkeys(anchor for _, anchor in pairs)
    if settings.references != "pictures":
        latents = {anchor: _sampled(model, anchor, settings) for anchor in anchors}
    elif concept.images is None:
        raise ForgetError(
            f"'{concept.name}' has no pictures: connect some of its anchor, or set references to "
            "'samples'."
        )
    else:
        latents = dict.fromkeys(anchors, reference_latents(model, concept, settings.size))
    return [
        Pair(model.encode(prompt), model.encode(anchor), latents[anchor])
        for prompt, anchor in pairs
    ]


def prepare_kept(model: Model, words: Sequence[str], settings: Settings) -> list[Pair]:
    """Words or prompts to keep, each paired with itself."""
    prompts = [Prompt(text, text) for text in words]
    texts = [model.encode(prompt) for prompt in prompts]
    return [Pair(t, t, _sampled(model, prompt, settings)) for prompt, t in zip(prompts, texts)]


def _sampled(model: Model, prompt: Prompt, settings: Settings) -> torch.Tensor:
    """Latents [N, C, h, w] to noise, for a prompt without pictures of its own."""
    family = model.family
    size = settings.size or family.resolution
    side, channels = size // family.latent_factor, family.latent_channels
    if settings.references == "zeros":
        return torch.zeros(1, channels, side, side)
    seeds = range(settings.seed, settings.seed + settings.samples)
    given = settings.sample_steps, settings.guidance
    if family.known:
        return cast(UNetModel, model).sample(prompt, seeds, size, *given)
    text, empty = model.encode(prompt), model.encode(Prompt("", ""))
    parts = seeded_noise(seeds, side, channels).split(DRAWN_AT_ONCE)
    with model.borrow_denoiser() as denoiser:
        return torch.cat([drawn(denoiser, text, empty, noise, *given).cpu() for noise in parts])


class Batch(NamedTuple):
    x_t: torch.Tensor  # [B, C, h, w]
    t: torch.Tensor  # [B]
    noise: torch.Tensor  # [B, C, h, w]; of flow models, the velocity
    target: Text  # [B, T, D]
    anchor: Text  # [B, T', D]


class Batches:
    """Endless training batches: concepts and the pairs of each in shuffled orders, with a random
    latent, time step and noise; of ``size`` pairs a step, or ``split``, of one."""

    def __init__(
        self,
        concepts: Sequence[Sequence[Pair]],
        size: int,
        generator: torch.Generator,
        denoiser: Denoiser,
        split: bool = False,
    ):
        self.size, self.split = size, split
        self.generator, self.denoiser = generator, denoiser
        self.pairs = shuffled_cycle(
            [shuffled_cycle(pairs, generator) for pairs in concepts], generator
        )

    def __call__(self) -> list[Batch]:
        """A step's ``Batch`` for each combination of prompt lengths; split, or where the host takes
        one prompt a forward, for each pair."""
        groups: dict[tuple[torch.Size, torch.Size, int], list[Batch]] = {}
        for index in range(self.size):
            pair = next(next(self.pairs))
            noised = noise_one(pair.latents, self.denoiser.schedule, self.generator)
            apart = index * (self.split or pair.target.alone)
            key = pair.target.context.shape, pair.anchor.context.shape, apart
            groups.setdefault(key, []).append(Batch(*noised, pair.target, pair.anchor))
        return [self._stack(rows) for rows in groups.values()]

    def _stack(self, rows: Sequence[Batch]) -> Batch:
        *noised, targets, anchors = zip(*rows)
        x_t, t, noise = (torch.cat(tensors).to(self.denoiser.device) for tensors in noised)
        return Batch(x_t, t, noise, Text.cat(targets), Text.cat(anchors))


@contextmanager
def start_detached(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Stop gradients through the first token's output of some Linears, for a while."""

    def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(hook))
        yield


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Train a patch that draws their anchors for the concepts' prompts; see ``methods.forget``."""
    model, concepts, settings = task.model, task.concepts, task.settings
    words = keep_for(concepts, task.keep, "none") if settings.preserve else ()
    downs = protected_downs(task, settings.layers)  # both refuse before any work
    in_scope(model.family, settings.layers)
    pairs = [prepare(model, concept, settings) for concept in concepts]
    kept = prepare_kept(model, words, settings)

    @contextmanager
    def open_loss(denoiser: Denoiser, switch: Switch, split: bool) -> Iterator[tuple[Draw, LossOf]]:
        generator = torch.Generator().manual_seed(settings.seed)
        batches = Batches(pairs, settings.batch, generator, denoiser, split)
        batches_kept = Batches([kept], settings.batch, generator, denoiser, split)

        def draw() -> tuple[list[Batch], list[Batch]]:
            return batches(), batches_kept() if kept else []

        def loss_of(drawn: tuple[list[Batch], list[Batch]]) -> Iterator[torch.Tensor]:
            for group, how, weight in zip(drawn, (settings, KEEP_LOSS), (1.0, settings.preserve)):
                for batch in group:
                    share = len(batch.t) / settings.batch
                    yield ablation_loss(denoiser, switch, batch, how) * (weight * share)

        # Other text encoders have no start token.
        detached = settings.detach_start and model.family.known
        read = [layer.name for layer in layers_of(model.family) if layer.is_key_or_value]
        with start_detached([denoiser.module(name) for name in read * detached]):
            yield draw, loss_of

    probe_inputs: list[ProbeInput] = []
    if model.family.known:
        flags = concept_flags(model, concepts[0].training_prompts()[0])
        probe_inputs = [(pairs[0][0].target, flags, pairs[0][0].latents[:1])]
    given = task, settings.layers, open_loss, options, None, probe_inputs, downs
    return train_patch(*given, forwards=2 if settings.prior else 1)


def ablation_loss(
    denoiser: Denoiser, switch: Switch, batch: Batch, settings: Settings
) -> torch.Tensor:
    """``concept_ablation`` of a batch."""
    x_t, t, noise, concept, anchor = batch
    predicted = denoiser.predict_noise(x_t, t, concept)
    target = noise
    if settings.target == "model":
        with torch.no_grad(), switch.off() if settings.teacher == "frozen" else nullcontext():
            target = denoiser.predict_noise(x_t, t, anchor)
    prior = denoiser.predict_noise(x_t, t, anchor) if settings.prior else None
    return concept_ablation(predicted, target, prior, noise, settings.prior)
