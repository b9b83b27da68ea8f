"""Attention re-steering (Forget-Me-Not, Zhang et al. 2023, arXiv 2303.17591).

The attention that a concept's tokens get, in every cross-attention layer, is trained away. What
the paper leaves open is taken from the released code, SHI-Labs/Forget-Me-Not train_attn.py.
"""

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from ..attention import watch_attention
from ..errors import ForgetError, NonFiniteLoss
from ..families import layers
from ..forwards import checkpointed
from ..lowrank import Full, LowRank, attached
from ..model import Text, cross_attention_names
from ..objectives import attention_resteering
from ..patch import ForgetPatch, new_info
from ..probe import Probe, flags_of
from ..schedule import add_noise
from ..spans import END_TOKENS
from ..train import Optimiser, train

SCOPES = ("kv", "attention", "unet")
REFERENCES = ("zeros", "samples")


@dataclass(frozen=True)
class Settings:
    """Re-steering's settings. ``RELEASED`` holds those of the released code.

    Attributes:
        steps: optimiser steps for each concept; more forget more, and harm neighbours.
        lr: AdamW's learning rate.
        rank: rank of each layer's change in the patch; 1 to 128.
        layers: what to train: cross-attention's keys and values (``kv``), all four of its
            projections (``attention``), or every Linear and Conv2d (``unet``).
        full_weights: train whole weight matrices and cut them to ``rank`` afterwards, as
            released. False trains the low-rank factors themselves: far less memory, nothing cut.
        end_tokens: also take attention from ``<|endoftext|>``: ``none``, the ``first`` or ``all``.
        references: what is noised for concepts without pictures: ``zeros`` latents (the released
            option no_real_image) or the model's own ``samples``.
        samples: how many own samples a concept.
        batch: prompts a step. The released code uses 1.
        size: pixels a side; 0 takes the family's.
        checkpointing: recompute activations in backward: less memory, more time.
        seed: for the noise, the time steps, the order and the initial factors.
    """

    steps: int = 50
    lr: float = 2e-3
    rank: int = 4
    layers: str = "kv"
    full_weights: bool = False
    end_tokens: str = "none"
    references: str = "zeros"
    samples: int = 4
    batch: int = 1
    size: int = 0
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        choices = {"layers": SCOPES, "end_tokens": END_TOKENS, "references": REFERENCES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ForgetError(
                    f"{name} is '{getattr(self, name)}': choose one of {', '.join(allowed)}."
                )
        for name, low, high in (("steps", 1, 100_000), ("rank", 1, 128), ("samples", 1, 64)):
            if not low <= getattr(self, name) <= high:
                raise ForgetError(f"{name} is {getattr(self, name)}: use {low} to {high}.")
        if not 0 < self.lr < 1:
            raise ForgetError(f"lr is {self.lr}: use a number between 0 and 1, such as 0.001.")
        if not 0 <= self.seed < 2**63:
            raise ForgetError(f"seed is {self.seed}: use 0 to {2**63 - 1}.")
        if not 1 <= self.batch <= 64:
            raise ForgetError(f"batch is {self.batch}: use 1 to 64.")
        if self.size % 64 or not 0 <= self.size <= 4096:
            raise ForgetError(f"size is {self.size}: use a multiple of 64 up to 4096, or 0.")


DEFAULT = Settings()
RELEASED = Settings(
    steps=35,
    lr=2e-6,
    rank=64,
    layers="unet",
    full_weights=True,
    end_tokens="all",
    references="samples",
)
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 7.0
LOOKS = 7  # how often a run looks at the first concept's attention; each costs a forward


@dataclass(frozen=True)
class Example:
    """One encoded prompt of a concept."""

    concept: int
    text: Text  # of one prompt, [1, T, D]
    flags: torch.Tensor  # bool [1, T]: whose attention is to vanish


@dataclass
class Data:
    examples: list[Example]
    latents: list[torch.Tensor]  # a concept: [N, 4, h, w]

    def looked_at(self):
        """The first prompt of each concept, as ``Probe`` looks at it."""
        first = {}
        for example in self.examples:
            first.setdefault(example.concept, example)
        return [
            (example.text, example.flags, self.latents[concept][:1])
            for concept, example in first.items()
        ]


def prepare(model, concepts, settings):
    """Encode prompts, find the tokens to forget, and get the latents to noise.

    Raises:
        ForgetError: no concept, or one whose tokens cannot be found in its prompt.
    """
    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    examples = []
    for index, concept in enumerate(concepts):
        for prompt in concept.training_prompts():
            flags = flags_of(model, prompt, settings.end_tokens)
            examples.append(Example(index, model.encode(prompt), flags))
    size = settings.size or model.family.resolution
    return Data(examples, [_latents(model, concept, settings, size) for concept in concepts])


def _latents(model, concept, settings, size):
    if concept.images is not None:
        latents = model.encode_images(concept.images, size)
        if latents.shape[1] != 4:
            raise ForgetError(
                f"This VAE gives {latents.shape[1]} channels, but {model.family.title} reads 4: "
                "use the VAE of the same checkpoint."
            )
        return latents
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


class Draws:
    """Endless training batches: shuffled examples, a random latent, time step and noise each."""

    def __init__(self, data, settings, alphas_cumprod, device):
        self.data, self.batch, self.device = data, settings.batch, device
        self.alphas_cumprod = alphas_cumprod.cpu()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._queues = {}

    def __call__(self):
        """What one step trains on: a ``Batch`` for each length of prompt that was drawn."""
        drawn = [self._draw() for _ in range(self.batch)]
        lengths = {row.flags.shape[1] for row in drawn}
        return [
            self._stack([row for row in drawn if row.flags.shape[1] == length])
            for length in sorted(lengths)
        ]

    def _draw(self):
        example = self._next_example()
        latents = self.data.latents[example.concept]
        index = torch.randint(len(latents), (1,), generator=self.generator)
        t = torch.randint(len(self.alphas_cumprod), (1,), generator=self.generator)
        noise = torch.randn(latents[index].shape, generator=self.generator)
        x_t = add_noise(latents[index], noise, self.alphas_cumprod[t])
        return Batch(x_t, t, example.text, example.flags)

    def _next_example(self):
        """Concepts take turns in a shuffled order, and so do the prompts of each."""
        concept = self._next("concepts", range(len(self.data.latents)))
        own = [example for example in self.data.examples if example.concept == concept]
        return self._next(concept, own)

    def _next(self, name, values):
        queue = self._queues.setdefault(name, [])
        if not queue:
            order = torch.randperm(len(values), generator=self.generator)
            queue += [values[i] for i in order.tolist()]
        return queue.pop()

    def _stack(self, rows):
        x_t, t, texts, flags = zip(*rows)
        x_t, t, flags = (torch.cat(tensors).to(self.device) for tensors in (x_t, t, flags))
        return Batch(x_t, t, Text.cat(texts), flags)


def in_scope(family, scope):
    """The layers a scope trains, in forward order."""
    wanted = {
        "kv": lambda layer: layer.is_key_or_value,
        "attention": lambda layer: layer.is_cross_attention,
        "unet": lambda layer: True,
    }[scope]
    return [layer for layer in layers(family) if wanted(layer)]


def make_adapters(borrowed, family, settings):
    generator = torch.Generator().manual_seed(settings.seed)
    adapters = {}
    for layer in in_scope(family, settings.layers):
        module = borrowed.module(layer.name)
        adapters[layer.name] = (
            Full(module, borrowed.device)
            if settings.full_weights
            else LowRank(module, settings.rank, generator, borrowed.device)
        )
    return adapters


def run(model, concepts, settings=Settings(), on_step=lambda step: None):
    """Train a patch that takes the attention away from the concepts' tokens.

    Args:
        model: a ``Model``; it comes back unchanged, also after an error.
        on_step: gets a ``train.Step`` after each step, and may raise to cancel.

    Returns:
        ForgetPatch

    Raises:
        ForgetError: bad input. NonFiniteLoss: training blew up; it carries the last good patch.
    """
    # ComfyUI runs nodes in inference mode, whose tensors autograd refuses.
    with torch.inference_mode(False), torch.enable_grad():
        data = prepare(model, concepts, settings)
        base = model.fingerprint()
        with model.borrow() as borrowed:
            adapters = make_adapters(borrowed, model.family, settings)
            error = None
            try:
                losses = fit(borrowed, model.family, adapters, data, settings, on_step)
            except NonFiniteLoss as caught:
                if len(caught.losses) < 2:  # nothing learnt that could be kept
                    raise
                error, losses = caught, caught.losses
        patch = _patch(model, base, concepts, settings, adapters, losses)
        if error:
            error.patch = patch
            raise error
        return patch


def fit(borrowed, family, adapters, data, settings, on_step):
    """Train the adapters in place; returns the losses."""
    draws = Draws(data, settings, borrowed.alphas_cumprod, borrowed.device)
    probe = Probe(data.looked_at()[:1], borrowed.alphas_cumprod, steps=(0.5,))
    modules = [borrowed.module(name) for name in cross_attention_names(family)]
    blocks = borrowed.checkpoint_blocks() if settings.checkpointing else []
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    steps = settings.steps * len(data.latents)
    with (
        attached(adapters, borrowed.module),
        watch_attention(modules, borrowed.context_argument) as watch,
        checkpointed(blocks),
    ):
        before = now = probe.look(borrowed, watch)[0]

        def loss_at(index):
            return attention_resteering(
                [layer for batch in draws() for layer in watched_forward(borrowed, watch, batch)]
            )

        def report(step):
            nonlocal now
            if step.index % max(1, steps // LOOKS) == 0 or step.index == steps:
                now = probe.look(borrowed, watch)[0]
            on_step(replace(step, before=before, now=now))

        half = borrowed.module(next(iter(adapters))).weight.dtype == torch.float16
        scale = 1024.0 if half else 1.0
        return train(parameters, loss_at, steps, Optimiser(settings.lr), report, scale)


def watched_forward(borrowed, watch, batch):
    """What the flagged tokens of a batch get, a tensor [N, H, P] a layer."""
    return watch(batch.flags, lambda: borrowed.denoise(batch.x_t, batch.t, batch.text))


def _patch(model, base, concepts, settings, adapters, losses):
    changes, worst = {}, 0.0
    for name, adapter in adapters.items():
        up, down, error = adapter.factors(settings.rank)
        changes[name] = up.cpu().clone(), down.cpu().clone()
        worst = max(worst, error)
    info = new_info(model, base, "resteer", asdict(settings), concepts, losses, worst)
    return ForgetPatch(model.family, changes, info)
