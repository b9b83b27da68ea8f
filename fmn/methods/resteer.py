"""Attention re-steering (Forget-Me-Not, Zhang et al. 2023, arXiv 2303.17591).

The attention that a concept's tokens get, in every cross-attention layer, is trained away. What
the paper leaves open is taken from the released code, SHI-Labs/Forget-Me-Not train_attn.py.
"""

from dataclasses import asdict, dataclass, replace

import torch

from ..attention import watch_attention
from ..errors import ForgetError, NonFiniteLoss
from ..families import layers
from ..forwards import checkpointed
from ..lowrank import Full, LowRank, attached
from ..model import Text, cross_attention
from ..objectives import attention_resteering
from ..patch import ForgetPatch, new_info
from ..probe import Probe
from ..schedule import add_noise
from ..spans import END_TOKENS, flagged_positions
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
        scope: layers to train: cross-attention's keys and values (``kv``), all four of its
            projections (``attention``), or every Linear and Conv2d (``unet``).
        full: train whole weight matrices and cut them to ``rank`` afterwards, as released. False
            trains the low-rank factors themselves: far less memory, and nothing is cut off.
        end_tokens: also take attention from ``<|endoftext|>``: ``none``, the ``first`` or ``all``.
        references: what is noised for concepts without pictures: ``zeros`` latents (the released
            option no_real_image) or the model's own ``samples``.
        samples: how many own samples a concept.
        batch: prompts a step. The released code uses 1.
        size: pixels a side; 0 takes the family's.
        checkpointing: recompute activations in backward: about half the memory, a third slower.
        seed: for the noise, the time steps, the order and the initial factors.
    """

    steps: int = 35
    lr: float = 1e-3
    rank: int = 4
    scope: str = "kv"
    full: bool = False
    end_tokens: str = "none"
    references: str = "zeros"
    samples: int = 4
    batch: int = 1
    size: int = 0
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        choices = {"scope": SCOPES, "end_tokens": END_TOKENS, "references": REFERENCES}
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
        if not 1 <= self.batch <= 64:
            raise ForgetError(f"batch is {self.batch}: use 1 to 64.")
        if self.size % 64 or not 0 <= self.size <= 4096:
            raise ForgetError(f"size is {self.size}: use a multiple of 64 up to 4096, or 0.")


RELEASED = Settings(lr=2e-6, scope="unet", full=True, end_tokens="all", references="samples")
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 7.0
LOOKS = 10  # how often a run looks at the concepts' attention; each look costs three forwards


@dataclass
class Example:
    """One row of training data: a prompt's place in the text batch and a concept's latents."""

    prompt: int
    concept: int


@dataclass
class Data:
    text: Text  # all prompts, [B, T, D]
    flags: torch.Tensor  # bool [B, T]: whose attention is to vanish
    latents: list[torch.Tensor]  # a concept: [N, 4, h, w]
    examples: list[Example]

    def probe(self, alphas_cumprod):
        """A look at the first prompt of each concept, at most eight of them."""
        first = {}
        for example in self.examples:
            first.setdefault(example.concept, example.prompt)
        rows = torch.tensor(list(first.values())[:8])
        latents = self.latents[: len(rows)]
        return Probe(self.text.rows(rows), self.flags[rows], latents, alphas_cumprod)


def prepare(model, concepts, settings):
    """Encode prompts, find the tokens to forget, and get the latents to noise.

    Raises:
        ForgetError: no concept, or one whose tokens cannot be found in its prompt.
    """
    if not concepts:
        raise ForgetError("There is no concept to forget: connect or name at least one.")
    prompts, examples = [], []
    for index, concept in enumerate(concepts):
        for prompt in concept.training_prompts():
            examples.append(Example(len(prompts), index))
            prompts.append(prompt)
    ids = [model.tokenize(prompt) for prompt in prompts]
    if len({len(row) for row in ids}) > 1:
        raise ForgetError(
            "Some prompts are longer than 77 tokens and some are not, which one run cannot mix: "
            "shorten the long ones, or give each concept a run of its own."
        )
    flags = torch.zeros(len(ids), len(ids[0]), dtype=torch.bool)
    for row, (prompt, tokens) in enumerate(zip(prompts, ids)):
        subject = model.tokenize(prompt._replace(text=prompt.subject, plain=True))
        flags[row, flagged_positions(prompt, tokens, subject, settings.end_tokens)] = True
    size = settings.size or model.family.resolution
    latents = [_latents(model, concept, settings, size) for concept in concepts]
    return Data(model.encode(prompts), flags, latents, examples)


def _latents(model, concept, settings, size):
    if concept.images is not None:
        return model.encode_images(concept.images, size)
    if settings.references == "samples":
        seeds = range(settings.seed, settings.seed + settings.samples)
        prompt = concept.training_prompts()[0]
        return model.sample(prompt, seeds, size, SAMPLE_STEPS, SAMPLE_GUIDANCE)
    return torch.zeros(1, 4, size // 8, size // 8)


class Draws:
    """Endless training batches: shuffled examples, a random latent, time step and noise each."""

    def __init__(self, data, settings, alphas_cumprod, device):
        self.data, self.batch, self.device = data, settings.batch, device
        self.alphas_cumprod = alphas_cumprod
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._queue = []

    def _next_example(self):
        if not self._queue:
            order = torch.randperm(len(self.data.examples), generator=self.generator)
            self._queue = [self.data.examples[i] for i in order.tolist()]
        return self._queue.pop()

    def __call__(self):
        """x_t [B, 4, h, w], t [B], text and flags [B, T] of one step, on the device."""
        examples = [self._next_example() for _ in range(self.batch)]
        rows = torch.tensor([example.prompt for example in examples])
        clean = torch.stack([self._latent(example.concept) for example in examples])
        t = torch.randint(len(self.alphas_cumprod), (self.batch,), generator=self.generator)
        noise = torch.randn(clean.shape, generator=self.generator)
        x_t = add_noise(clean, noise, self.alphas_cumprod.cpu()[t]).to(self.device)
        return x_t, t.to(self.device), self.data.text.rows(rows), self.data.flags[rows]

    def _latent(self, concept):
        latents = self.data.latents[concept]
        return latents[torch.randint(len(latents), (), generator=self.generator)]


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
    for layer in in_scope(family, settings.scope):
        module = borrowed.module(layer.name)
        adapters[layer.name] = (
            Full(module, borrowed.device)
            if settings.full
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
                losses = fit(
                    borrowed, model.family, adapters, data, settings, len(concepts), on_step
                )
            except NonFiniteLoss as caught:
                if not caught.losses:
                    raise
                error, losses = caught, caught.losses
        patch = _patch(model, base, concepts, settings, adapters, losses)
        if error:
            error.patch = patch
            raise error
        return patch


def fit(borrowed, family, adapters, data, settings, concepts, on_step):
    """Train the adapters in place; returns the losses."""
    draws = Draws(data, settings, borrowed.alphas_cumprod, borrowed.device)
    probe = data.probe(borrowed.alphas_cumprod)
    modules = [borrowed.module(name) for name in cross_attention(family)]
    blocks = borrowed.checkpoint_blocks() if settings.checkpointing else []
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    steps = settings.steps * concepts
    with (
        attached(adapters, borrowed.module),
        watch_attention(modules, borrowed.context_argument) as watch,
        checkpointed(blocks),
    ):
        before = now = probe.look(borrowed, watch)

        def loss_at(index):
            x_t, t, text, flags = draws()
            watched = watch(flags.to(borrowed.device), lambda: borrowed.denoise(x_t, t, text))
            return attention_resteering(watched)

        def report(step):
            nonlocal now
            if step.index % max(1, steps // LOOKS) == 0 or step.index == steps:
                now = probe.look(borrowed, watch)
            on_step(replace(step, before=before, now=now))

        return train(parameters, loss_at, steps, Optimiser(settings.lr), report)


def _patch(model, base, concepts, settings, adapters, losses):
    changes, worst = {}, 0.0
    for name, adapter in adapters.items():
        up, down, error = adapter.factors(settings.rank)
        changes[name] = up.cpu().clone(), down.cpu().clone()
        worst = max(worst, error)
    info = new_info(model, base, "resteer", asdict(settings), concepts, losses, worst)
    return ForgetPatch(model.family, changes, info)
