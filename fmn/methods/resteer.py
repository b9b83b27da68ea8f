"""Attention re-steering (Forget-Me-Not, Zhang et al. 2023, arXiv 2303.17591).

It trains away the attention that a concept's tokens get in every cross-attention layer. What the
paper leaves open is taken from the released code, SHI-Labs/Forget-Me-Not train_attn.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch

from ..closed_form.protected_subspace import protected_downs
from ..concepts.concept import Concept, Prompt
from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..models.adapters import Switch
from ..models.attention import Watcher, watch_attention
from ..models.attention_maps import ProbeInput, concept_flags
from ..models.interface import Text, UNet, UNetModel
from ..models.sampling import DDPMSchedule
from ..models.token_positions import END_TOKENS, end_positions, tokenize_with_placeholders
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..progress import OnStep, ignore
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..training import textual_inversion
from ..training.fit_adapters import (
    Draw,
    LossOf,
    noise_one,
    reference_latents,
    shuffled_cycle,
    train_patch,
)  # fmt: skip
from ..training.losses import attention_resteering
from ..training.run import TrainingOptions
from . import shared_settings as shared

TITLE = "Re-steer"
REVISION = 1
ABOUT = (
    "Attention re-steering (Forget-Me-Not, arXiv 2303.17591): trains away the attention that the "
    "concept's words get."
)


REFERENCES = ("zeros", "samples")


@dataclass(frozen=True)
class Settings(Base, method="resteer"):
    trains = True
    steps: int = shared.steps(default=100)
    lr: float = shared.lr(
        2e-3,
        "AdamW's learning rate. Around 0.002 for low rank; the released code trains full weights "
        "with 0.000002.",
    )
    rank: int = shared.rank()
    layers: str = advanced(
        "kv",
        "What is trained. kv: keys and values of cross-attention. attention: all of "
        "cross-attention. unet: every linear and convolution layer.",
        choices=("kv", "attention", "unet"),
    )
    full_weights: bool = shared.full_weights()
    end_tokens: str = advanced(
        "none",
        "Also take attention from the end-of-text token, which sums up the prompt: none, the "
        "first one, or all (in Stable Diffusion 1.x that includes all padding, as released).",
        choices=END_TOKENS,
    )
    references: str = setting(
        "samples",
        "What is noised for concepts without pictures. samples: pictures that the model draws of "
        "the concept first. zeros: nothing, which is fastest and forgets far less.",
        choices=REFERENCES,
    )
    samples: int = advanced(
        4, "How many pictures a concept, if references is 'samples'.", limits=(1, 64)
    )
    batch: int = advanced(
        1,
        "Prompts a step. 1 as released; more are steadier, slower and need more memory.",
        limits=(1, 64),
    )
    size: int = shared.size()
    checkpointing: bool = shared.checkpointing()
    seed: int = shared.seed()
    inverted: int = setting(
        0,
        "How many tokens are first learned from the concept's reference pictures (textual "
        "inversion); their attention is trained away instead of the name's. 0: none, the name is "
        "taken; 4 as released.",
        limits=(0, 8),
    )
    inversion_steps: int = advanced(
        500, "Steps of that learning. Too few learn another thing.", limits=(1, 100_000)
    )
    protect: bool = shared.protect()


RELEASED = Settings(
    steps=35, lr=2e-6, rank=64, layers="unet", full_weights=True, end_tokens="all",
    references="samples",
)  # fmt: skip
INVERTED_LR = 1e-2  # of our textual inversion, whose batches are larger than the released one's
PRESETS = {"resteer": Settings(), "resteer-released": RELEASED}
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 7.0


@dataclass(frozen=True)
class Example:
    """One encoded prompt of a concept."""

    concept: int
    text: Text  # of one prompt, [1, T, D]
    flags: torch.Tensor  # bool [1, T]: the tokens whose attention is trained away


@dataclass
class Data:
    examples: list[Example]
    latents: list[torch.Tensor]  # a concept: [N, 4, h, w]

    def probe_inputs(self) -> list[ProbeInput]:
        """The first prompt of each concept, for ``AttentionProbe``."""
        first = {example.concept: example for example in reversed(self.examples)}
        return [
            (example.text, example.flags, self.latents[concept][:1])
            for concept, example in sorted(first.items())
        ]


def prepare(
    model: UNetModel, concepts: Sequence[Concept], settings: Settings, on_step: OnStep = ignore
) -> Data:
    """Encode prompts, find the tokens to forget, and get the latents to noise.

    Raises:
        ForgetError: a concept's tokens are not in its prompt.
    """
    examples = []
    for index, concept in enumerate(concepts):
        if settings.inverted:
            examples.append(_inverted(model, index, concept, settings, on_step))
            continue
        for prompt in concept.training_prompts():
            flags = concept_flags(model, prompt, settings.end_tokens)
            examples.append(Example(index, model.encode(prompt), flags))
    size = settings.size or model.family.resolution
    return Data(examples, [_latents(model, concept, settings, size) for concept in concepts])


def _inverted(
    model: UNetModel, index: int, concept: Concept, settings: Settings, on_step: OnStep
) -> Example:
    """An example in which tokens learned from the concept's pictures stand for its name."""
    if concept.images is None:
        raise ForgetError(
            f"'{concept.name}' has no reference pictures to learn tokens from: connect some, or "
            "set inverted to 0."
        )
    first = concept.training_prompts()[0]
    template = first.words.replace("{", "").replace("}", "").replace(first.subject, "{}", 1)
    inversion = textual_inversion.Settings(
        tokens=settings.inverted, steps=settings.inversion_steps, lr=INVERTED_LR,
        seed=settings.seed, start=first.subject, templates=(template,),
    )  # fmt: skip
    with model.borrow_denoiser() as denoiser:
        learned = textual_inversion.invert(model, denoiser, concept.images, inversion, on_step)
    prompt = fill(template, PLACEHOLDER)
    with model.borrow_text_encoder() as text_encoder, torch.no_grad():
        text, _ = text_encoder.encode(prompt, learned.vectors)
    ids = tokenize_with_placeholders(
        lambda words: cast(list[int], model.tokenize(Prompt(words, words))), prompt,
        settings.inverted,
    )  # fmt: skip
    flags = torch.tensor([[token is None for token in ids]])
    flags[0, end_positions(ids, settings.end_tokens)] = True
    return Example(index, Text(text.context.float().cpu().clone(), text.vectors), flags)


def _latents(model: UNetModel, concept: Concept, settings: Settings, size: int) -> torch.Tensor:
    if concept.images is not None:
        return reference_latents(model, concept, size)
    if settings.references == "samples":
        seeds = range(settings.seed, settings.seed + settings.samples)
        prompt = concept.training_prompts()[0]
        return model.sample(prompt, seeds, size, SAMPLE_STEPS, SAMPLE_GUIDANCE)
    return torch.zeros(1, 4, size // 8, size // 8)


class Batch(NamedTuple):
    x_t: torch.Tensor  # [B, 4, h, w]
    t: torch.Tensor  # [B]
    text: Text  # [B, T, D]
    flags: torch.Tensor  # bool [B, T]


class Batches:
    """Endless training batches: concepts and the prompts of each in shuffled orders, with a random
    latent, time step and noise."""

    def __init__(
        self,
        data: Data,
        settings: Settings,
        alphas_cumprod: torch.Tensor,
        device: torch.device,
        split: bool = False,
    ):
        self.latents, self.size = data.latents, settings.batch
        self.split, self.device = split, device
        self.schedule = DDPMSchedule(alphas_cumprod)
        self.generator = torch.Generator().manual_seed(settings.seed)
        concepts = range(len(data.latents))
        examples = [[e for e in data.examples if e.concept == concept] for concept in concepts]
        self.examples = shuffled_cycle(
            [shuffled_cycle(each, self.generator, reverse=True) for each in examples],
            self.generator,
            reverse=True,
        )

    def __call__(self) -> list[Batch]:
        """A step's ``Batch`` for each length of prompt; split, for each prompt."""
        drawn = [self._draw() for _ in range(self.size)]
        if self.split:
            return [self._stack([row]) for row in drawn]
        lengths = {row.flags.shape[1] for row in drawn}
        return [
            self._stack([row for row in drawn if row.flags.shape[1] == length])
            for length in sorted(lengths)
        ]

    def _draw(self) -> Batch:
        example = next(next(self.examples))
        x_t, t, _ = noise_one(self.latents[example.concept], self.schedule, self.generator)
        return Batch(x_t, t, example.text, example.flags)

    def _stack(self, rows: Sequence[Batch]) -> Batch:
        x_ts, ts, texts, flags = zip(*rows)
        x_t, t, flag = (torch.cat(tensors).to(self.device) for tensors in (x_ts, ts, flags))
        return Batch(x_t, t, Text.cat(texts), flag)


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Train a patch that takes the attention away from the concepts' tokens.

    Args, errors: see ``methods.forget``. Words to keep need ``protect``.
    """
    settings = task.settings
    downs = protected_downs(task, settings.layers)
    data = prepare(task.model, task.concepts, settings, task.on_step)

    @contextmanager
    def open_loss(denoiser: UNet, switch: Switch, split: bool) -> Iterator[tuple[Draw, LossOf]]:
        batches = Batches(data, settings, denoiser.alphas_cumprod, denoiser.device, split)
        modules = denoiser.cross_attention_modules()
        with watch_attention(modules, denoiser.context_argument) as watch:
            yield batches, partial(split_loss if split else batched_loss, denoiser, watch)

    probe_inputs = data.probe_inputs()
    return train_patch(task, settings.layers, open_loss, options, None, probe_inputs, downs)


def batched_loss(denoiser: UNet, watch: Watcher, batches: Sequence[Batch]) -> torch.Tensor:
    """``attention_resteering`` of a step."""
    watched: list[torch.Tensor] = []  # the attention that flagged tokens get, [N, H, P] a layer
    for batch in batches:
        forward = partial(denoiser.predict_noise, batch.x_t, batch.t, batch.text)
        watched += watch(batch.flags, forward)
    return attention_resteering(watched)


def split_loss(denoiser: UNet, watch: Watcher, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    """The same in parts, one a batch, whose gradients add up to its gradient.

    A norm is no sum, but its gradient is that of |v|^2 / (2 |v|) with the divisor held constant,
    which takes all norms first, and so a second forward pass.
    """
    with torch.no_grad():
        norms = [batched_loss(denoiser, watch, [batch]) for batch in batches]
        whole = torch.stack(norms).norm().clamp_min(torch.finfo(torch.float32).tiny)
    for batch, norm in zip(batches, norms):
        half = batched_loss(denoiser, watch, [batch]).square() / (2 * whole)
        yield half + norm.square() / (2 * whole)
