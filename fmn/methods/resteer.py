"""Attention re-steering (Forget-Me-Not, Zhang et al. 2023, arXiv 2303.17591).

The attention that a concept's tokens get, in every cross-attention layer, is trained away. What
the paper leaves open is taken from the released code, SHI-Labs/Forget-Me-Not train_attn.py.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from ..closed_form.protected_subspace import protect, protected_downs
from ..concepts.concept import Prompt
from ..concepts.prompt_templates import PLACEHOLDER, fill
from ..errors import ForgetError
from ..models.attention import watch_attention
from ..models.attention_maps import concept_flags
from ..models.interface import Text, cross_attention_names, tokenize_with_placeholders
from ..models.sampling import q_sample
from ..models.token_positions import END_TOKENS, end_positions
from ..settings import Settings as Base
from ..settings import checkpointing, full_weights, lr, rank, seed, setting, size, steps
from ..training import textual_inversion
from ..training.fit_adapters import autograd, learn, reference_latents
from ..training.losses import attention_resteering

TITLE = "Re-steer"
ABOUT = (
    "Attention re-steering (Forget-Me-Not, arXiv 2303.17591): trains away the attention that the "
    "concept's words get."
)
SCOPES = ("kv", "attention", "unet")
REFERENCES = ("zeros", "samples")


@dataclass(frozen=True)
class Settings(Base, method="resteer"):
    steps: int = steps(50)
    lr: float = lr(
        2e-3,
        "AdamW's learning rate. Around 0.002 for low rank; the released code trains full weights "
        "with 0.000002.",
        advanced=True,
    )
    rank: int = rank()
    layers: str = setting(
        "kv",
        "What is trained. kv: keys and values of cross-attention. attention: all of "
        "cross-attention. unet: every linear and convolution layer.",
        choices=SCOPES,
        advanced=True,
    )
    full_weights: bool = full_weights()
    end_tokens: str = setting(
        "none",
        "Also take attention from the end-of-text token, which sums up the prompt: none, the "
        "first one, or all (in Stable Diffusion 1.x that includes all padding, as released).",
        choices=END_TOKENS,
        advanced=True,
    )
    references: str = setting(
        "zeros",
        "What is noised for concepts without pictures. zeros: nothing, which is fastest. samples: "
        "pictures that the model draws of the concept first.",
        choices=REFERENCES,
    )
    samples: int = setting(
        4, "How many pictures a concept, if references is 'samples'.", low=1, high=64, advanced=True
    )
    batch: int = setting(
        1,
        "Prompts a step. 1 as released; more are steadier, slower and need more memory.",
        low=1,
        high=64,
        advanced=True,
    )
    size: int = size()
    checkpointing: bool = checkpointing()
    seed: int = seed()
    inverted: int = setting(
        0,
        "How many tokens are first learned from the concept's reference pictures (textual "
        "inversion); their attention is trained away instead of the name's. 0: none, the name is "
        "taken; 4 as released.",
        low=0,
        high=8,
    )
    inversion_steps: int = setting(
        500,
        "Steps of that learning. Too few learn another thing.",
        low=1,
        high=100_000,
        advanced=True,
    )
    protect: bool = protect()


RELEASED = Settings(
    steps=35,
    lr=2e-6,
    rank=64,
    layers="unet",
    full_weights=True,
    end_tokens="all",
    references="samples",
)
INVERTED_LR = 1e-2  # of our textual inversion, whose batches are larger than the released one's
PRESETS = {"resteer": Settings(), "resteer-released": RELEASED}
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 7.0


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

    def probe_inputs(self):
        """The first prompt of each concept, as ``AttentionProbe`` looks at it."""
        first = {}
        for example in self.examples:
            first.setdefault(example.concept, example)
        return [
            (example.text, example.flags, self.latents[concept][:1])
            for concept, example in first.items()
        ]


def prepare(model, concepts, settings, on_step=lambda step: None):
    """Encode prompts, find the tokens to forget, and get the latents to noise.

    Args:
        on_step: gets the steps of textual inversion, if there is any.

    Raises:
        ForgetError: a concept's tokens cannot be found in its prompt.
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


def _inverted(model, index, concept, settings, on_step):
    """An example in which tokens learned from the concept's pictures stand for its name."""
    if concept.images is None:
        raise ForgetError(
            f"'{concept.name}' has no reference pictures to learn tokens from: connect some, or "
            "set inverted to 0."
        )
    first = concept.training_prompts()[0]
    template = first.text.replace("{", "").replace("}", "").replace(first.subject, "{}", 1)
    how = textual_inversion.Settings(
        tokens=settings.inverted, steps=settings.inversion_steps, lr=INVERTED_LR,
        seed=settings.seed, start=first.subject, templates=(template,),
    )  # fmt: skip
    with model.borrow_denoiser() as denoiser:
        found = textual_inversion.invert(model, denoiser, concept.images, how, on_step)
    prompt = fill(template, PLACEHOLDER)
    with model.borrow_text_encoder() as text_encoder, torch.no_grad():
        text, _ = text_encoder.encode(prompt, found.vectors)
    ids = tokenize_with_placeholders(
        lambda words: model.tokenize(Prompt(words, words)), prompt, settings.inverted
    )
    flags = torch.tensor([[token is None for token in ids]])
    flags[0, end_positions(ids, settings.end_tokens)] = True
    return Example(index, Text(text.context.float().cpu().clone(), text.vectors), flags)


def _latents(model, concept, settings, size):
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


class Draws:
    """Endless training batches: shuffled examples, a random latent, time step and noise each."""

    def __init__(self, data, settings, alphas_cumprod, device, apart=False):
        self.data, self.batch, self.apart, self.device = data, settings.batch, apart, device
        self.alphas_cumprod = alphas_cumprod.cpu()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._queues = {}

    def __call__(self):
        """What one step trains on: a ``Batch`` for each length of prompt that was drawn, or, apart,
        for each prompt."""
        drawn = [self._draw() for _ in range(self.batch)]
        if self.apart:
            return [self._stack([row]) for row in drawn]
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
        x_t = q_sample(latents[index], noise, self.alphas_cumprod[t])
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


@autograd()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Train a patch that takes the attention away from the concepts' tokens.

    Args, errors: see ``methods.forget``. What is to be kept counts only with ``protect``.
    """
    downs = protected_downs(model, concepts, keep, settings.layers, settings)
    data = prepare(model, concepts, settings, on_step)

    @contextmanager
    def open_loss(denoiser, switch, apart):
        draws = Draws(data, settings, denoiser.alphas_cumprod, denoiser.device, apart)
        modules = [denoiser.module(name) for name in cross_attention_names(model.family)]
        with watch_attention(modules, denoiser.context_argument) as watch:
            loss = partial(apart_loss if apart else whole_loss, denoiser, watch)
            yield draws, loss

    @contextmanager
    def rehearsed(denoiser, batch):
        how = replace(settings, batch=batch)
        batches = Draws(data, how, denoiser.alphas_cumprod, denoiser.device)()
        modules = [denoiser.module(name) for name in cross_attention_names(model.family)]
        with watch_attention(modules, denoiser.context_argument) as watch:
            for each in batches:
                watch.aim(each.flags)
            forwards = [
                partial(denoiser.predict_noise, each.x_t, each.t, each.text) for each in batches
            ]
            yield lambda: attention_resteering(
                [layer for forward in forwards for layer in watch.run(forward)]
            )

    probe_inputs = data.probe_inputs()
    return learn(
        model, concepts, settings, settings.layers, open_loss, None, probe_inputs, on_step, downs,
        rehearsed,
    )  # fmt: skip


def whole_loss(denoiser, watch, batches):
    """``attention_resteering`` of a step."""
    seen = [watched_forward(denoiser, watch, batch) for batch in batches]
    return attention_resteering([layer for batch in seen for layer in batch])


def apart_loss(denoiser, watch, batches):
    """The same in parts, one a batch, whose gradients sum to its own.

    A norm is no sum, but its gradient is: of |v|^2 / (2 |v|) with the divisor held, which needs
    all norms first, and so a second forward pass.
    """
    with torch.no_grad():
        norms = [whole_loss(denoiser, watch, [batch]) for batch in batches]
        whole = torch.stack(norms).norm().clamp_min(torch.finfo(torch.float32).tiny)
    for batch, norm in zip(batches, norms):
        half = whole_loss(denoiser, watch, [batch]).square() / (2 * whole)
        yield half + norm.square() / (2 * whole)


def watched_forward(denoiser, watch, batch):
    """What the flagged tokens of a batch get, a tensor [N, H, P] a layer."""
    return watch(batch.flags, lambda: denoiser.predict_noise(batch.x_t, batch.t, batch.text))
