"""Erased Stable Diffusion (ESD, Gandikota et al. 2023, arXiv 2303.07345).

The model is trained to predict, for the concept's prompts, the noise that leads away from the
concept by its own account. It needs no pictures: x_t is drawn by the model itself.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from ..closed_form.protected_subspace import protect, protected_downs
from ..concepts.concept import Prompt
from ..errors import ForgetError
from ..models.attention_maps import concept_flags
from ..models.interface import Text
from ..models.sampling import begin, expand, guided, predictions, step_count, trailing_timesteps
from ..settings import Settings as Base
from ..settings import checkpointing, full_weights, lr, rank, seed, setting, size, steps
from ..training.fit_adapters import autograd, in_scope, learn, shuffled_cycle
from ..training.loop import Optimiser
from ..training.losses import esd

TITLE = "ESD"
ABOUT = (
    "Erased Stable Diffusion (arXiv 2303.07345): trains the model to draw, for the concept's "
    "prompts, away from the concept. Slower than re-steering, and stronger."
)
ANY_MODEL = True
SCOPES = {"x": "attention", "x-strict": "kv", "u": "not-attention", "all": "unet"}
FROZEN, EDITED = "frozen", "edited"
EXACT, BIN = "exact", "bin"


@dataclass(frozen=True)
class Settings(Base, method="esd"):
    steps: int = steps(100)
    lr: float = lr(
        1e-3,
        "Adam's learning rate. Around 0.001 for low rank; the released codes train full weights "
        "with 0.00001 and 0.00005.",
        advanced=True,
    )
    eta: float = setting(
        2.0,
        "How far away from the concept, as in the current code. 0: nothing is forgotten. 1: the "
        "concept is read as the empty prompt. 2: beyond that; the paper's eta of 1.",
        low=0.0,
        high=100.0,
        step=0.01,
    )
    layers: str = setting(
        "x",
        "What is trained. x: all of cross-attention, for names and styles. x-strict: its keys and "
        "values alone. u: all but cross-attention, for broad concepts such as nudity. all: every "
        "linear and convolution layer; the only choice for some transformer models.",
        choices=tuple(SCOPES),
    )
    rank: int = rank(advanced=True)
    full_weights: bool = full_weights()
    erase_from: str = setting(
        "",
        "A prompt that shall lose the concept and nothing else, such as 'a cowboy' for the concept "
        "'cowboy hat'. Empty: the concept's own prompts lose it.",
    )
    sample_from: str = setting(
        FROZEN,
        "Which model draws what is trained on. frozen: the untouched one, as in the current code. "
        "edited: the one in training, as in the paper.",
        choices=(FROZEN, EDITED),
        advanced=True,
    )
    sampling_steps: int = setting(
        20,
        "Steps of a whole drawing; each training step does a random part of it. 50 as released. "
        "Fewer are faster, with fewer time steps to train at.",
        low=1,
        high=1000,
        advanced=True,
    )
    timesteps: str = setting(
        EXACT,
        "Time step to train at. exact: the one the drawing stopped at, as in the current code. "
        "bin: any down to the next one, as in the paper.",
        choices=(EXACT, BIN),
        advanced=True,
    )
    guidance: float = setting(
        3.0,
        "Guidance while drawing; 1 is none, and twice as fast.",
        low=0.0,
        high=100.0,
        step=0.1,
        advanced=True,
    )
    batch: int = setting(
        1,
        "Drawings a step, of the same prompt. More are steadier and slower.",
        low=1,
        high=64,
        advanced=True,
    )
    size: int = size()
    checkpointing: bool = checkpointing()
    seed: int = seed()
    protect: bool = protect()


PRESETS = {
    "esd": Settings(),
    "esd-u": Settings(layers="u"),
    "esd-paper": Settings(
        steps=1000,
        lr=1e-5,
        rank=64,
        full_weights=True,
        sample_from=EDITED,
        sampling_steps=50,
        timesteps=BIN,
    ),
    "esd-2025": Settings(steps=200, lr=5e-5, rank=64, full_weights=True, sampling_steps=50),
}


@dataclass(frozen=True)
class Example:
    """One prompt of a concept, encoded; all texts [1, T, D] with the same T.

    Attributes:
        concept: c, what is erased.
        source: c_from, what it is erased from; often the same object as ``concept``.
        empty: the empty prompt.
    """

    concept: Text
    source: Text
    empty: Text


def prepare(model, concepts, settings):
    """The examples of each concept: a list of lists."""
    empty, source = model.encode(Prompt("", "")), None
    if settings.erase_from.strip():
        written = Prompt(settings.erase_from, settings.erase_from, plain=False)
        source = model.encode(written)
    return [
        [_example(model.encode(prompt), source, empty) for prompt in concept.training_prompts()]
        for concept in concepts
    ]


def _example(concept, source, empty):
    if source is None:
        concept, empty = of_one_length([concept, empty])
        return Example(concept, concept, empty)
    return Example(*of_one_length([concept, source, empty]))


def of_one_length(texts):
    """Prompts of different numbers of sections repeated to the same number of tokens.

    Attention to a context that is repeated whole gives what it gives to the context itself. Those
    that stay alone keep their lengths.
    """
    if texts[0].alone:
        return texts
    length = math.lcm(*(text.context.shape[1] for text in texts))
    return [
        replace(text, context=text.context.repeat(1, length // text.context.shape[1], 1))
        for text in texts
    ]


class Draws:
    """Endless training batches: prompts in shuffled turns, each with a drawing begun for it."""

    def __init__(self, examples, settings, denoiser, switch, side, channels=4):
        self.settings, self.denoiser, self.switch = settings, denoiser, switch
        self.shape = settings.batch, channels, side, side
        self.generator = torch.Generator().manual_seed(settings.seed)
        own = [shuffled_cycle(each, self.generator) for each in examples]
        self.prompts_in_turn = shuffled_cycle(own, self.generator)
        # The drawing stops at times[k]; bin k reaches down to times[k + 1], not included.
        self.times = [*trailing_timesteps(step_count(denoiser), settings.sampling_steps), -1]

    def __call__(self):
        """An ``Example``, x_t [B, C, h, w] and its t."""
        return self.begun(*self.pick())

    def pick(self):
        """What is random in a batch: the ``Example``, noise, number of drawing steps, and t."""
        example = next(next(self.prompts_in_turn))
        k = self._number(0, self.settings.sampling_steps)
        exact = self.settings.timesteps == EXACT
        t = self.times[k] if exact else self._number(self.times[k + 1] + 1, self.times[k] + 1)
        return example, torch.randn(self.shape, generator=self.generator), k, t

    def begun(self, example, noise, k, t):
        """The batch of a ``pick``."""
        return example, self._draw(example, noise.to(self.denoiser.device), k), t

    def _number(self, start, end):
        return int(torch.randint(start, end, (1,), generator=self.generator))

    def _draw(self, example, noise, k):
        """The first k steps of a drawing of what is erased from."""
        text = expand(example.source, len(noise))
        predict = guided(self.denoiser, text, example.empty, self.settings.guidance)
        frozen = self.settings.sample_from == FROZEN
        with self.switch.off() if frozen else nullcontext():
            return begin(self.denoiser, predict, noise, self.settings.sampling_steps, k)


@autograd()
def run(model, concepts, settings=Settings(), on_step=lambda step: None, keep=()):
    """Train a patch with which the concepts' prompts lead away from them.

    Args, errors: see ``methods.forget``. What is to be kept counts only with ``protect``.
    """
    scope, family = SCOPES[settings.layers], model.family
    if settings.protect and not family.known:
        raise ForgetError(
            f"protect needs the keys and values of Stable Diffusion 1.x, 2.x or XL, and "
            f"{family.title} is none of them: turn protect off."
        )
    in_scope(family, scope)
    downs = protected_downs(model, concepts, keep, scope, settings)
    examples = prepare(model, concepts, settings)
    side = (settings.size or family.resolution) // family.latent_factor

    def open_loss(denoiser, switch, apart):
        draws = Draws(examples, settings, denoiser, switch, side, family.latent_channels)

        def loss(picked):
            example, x_t, t = draws.begun(*picked)
            parts = x_t.split(1 if apart else len(x_t))
            for part in parts:
                yield loss_of(denoiser, switch, example, part, t, settings.eta) / len(parts)

        return nullcontext((draws.pick, loss))

    probe_inputs = []
    if family.known:
        prompt = concepts[0].training_prompts()[0]
        latent = torch.zeros(1, 4, side, side)
        probe_inputs = [(model.encode(prompt), concept_flags(model, prompt), latent)]
    # Adam as released: no weight decay, no clipping.
    optimiser = Optimiser(settings.lr, weight_decay=0.0, max_norm=math.inf)
    return learn(
        model, concepts, settings, scope, open_loss, optimiser, probe_inputs, on_step, downs
    )


def loss_of(denoiser, switch, example, x_t, t, eta):
    """ESD's loss for x_t [B, C, h, w] at the time step t."""
    count = len(x_t)
    texts = [example.source, example.concept, example.empty]
    if example.source is example.concept:
        texts = texts[1:]
    with switch.off(), torch.no_grad():
        frozen = predictions(denoiser, x_t, t, texts)
    predicted = denoiser.predict_noise(x_t, torch.full((count,), t), expand(example.source, count))
    return esd(predicted, frozen[0], *frozen[-2:], eta)
