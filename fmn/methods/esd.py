"""Erased Stable Diffusion (ESD, Gandikota et al. 2023, arXiv 2303.07345).

The model is trained to predict, for the concept's prompts, the noise that leads away from the
concept by its own account. It needs no pictures: x_t is drawn by the model itself.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from ..closed_form.protected_subspace import protected_downs
from ..concepts.concept import Concept, Prompt
from ..models.adapters import Switch
from ..models.attention_maps import ProbeInput, concept_flags
from ..models.interface import Denoiser, Model, Text
from ..models.sampling import expand, guided, predictions, trailing_timesteps
from ..patches.patch import ForgetPatch
from ..patches.task import Task, method_run
from ..settings import Settings as Base
from ..settings import advanced, setting
from ..training.fit_adapters import Draw, LossOf, in_scope, shuffled_cycle, train_patch
from ..training.loop import AdamWConfig
from ..training.losses import esd
from ..training.run import TrainingOptions
from . import shared_settings as shared

TITLE = "ESD"
REVISION = 1
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
    trains = True
    steps: int = shared.steps(default=100)
    lr: float = shared.lr(
        1e-3,
        "Adam's learning rate. Around 0.001 for low rank; the released codes train full weights "
        "with 0.00001 and 0.00005.",
    )
    eta: float = setting(
        2.0,
        "How far away from the concept, as in the current code. 0: nothing is forgotten. 1: the "
        "concept is read as the empty prompt. 2: beyond that; the paper's eta of 1.",
        limits=(0.0, 100.0, 0.01),
    )
    layers: str = setting(
        "x",
        "What is trained. x: all of cross-attention, for names and styles. x-strict: its keys and "
        "values alone. u: all but cross-attention, for broad concepts such as nudity. all: every "
        "linear and convolution layer; the only choice for some transformer models.",
        choices=tuple(SCOPES),
    )
    rank: int = shared.rank(advanced=True)
    full_weights: bool = shared.full_weights()
    erase_from: str = setting(
        "",
        "A prompt that should lose only the concept, such as 'a cowboy' for the concept "
        "'cowboy hat'. Empty: the concept's own prompts lose it.",
    )
    sample_from: str = advanced(
        FROZEN,
        "Which model draws the training images. frozen: the original, as in the current code. "
        "edited: the one in training, as in the paper.",
        choices=(FROZEN, EDITED),
    )
    sampling_steps: int = advanced(
        20,
        "Steps of a whole drawing; each training step does a random part of it. 50 as released. "
        "Fewer are faster, with fewer time steps to train at.",
        limits=(1, 1000),
    )
    timesteps: str = advanced(
        EXACT,
        "Time step to train at. exact: the one the drawing stopped at, as in the current code. "
        "bin: any down to the next one, as in the paper.",
        choices=(EXACT, BIN),
    )
    guidance: float = advanced(
        3.0, "Guidance while drawing; 1 is none, and twice as fast.", limits=(0.0, 100.0, 0.1)
    )
    batch: int = advanced(
        1, "Drawings a step, of the same prompt. More are steadier and slower.", limits=(1, 64)
    )
    size: int = shared.size()
    checkpointing: bool = shared.checkpointing()
    seed: int = shared.seed()
    protect: bool = shared.protect()


PRESETS = {
    "esd": Settings(),
    "esd-u": Settings(layers="u"),
    "esd-paper": Settings(
        steps=1000, lr=1e-5, rank=64, full_weights=True, sample_from=EDITED, sampling_steps=50,
        timesteps=BIN,
    ),
    "esd-2025": Settings(steps=200, lr=5e-5, rank=64, full_weights=True, sampling_steps=50),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One prompt of a concept, encoded; all texts [1, T, D] with the same T."""

    concept: Text  # c, the concept to erase
    source: Text  # c_from, the prompt that it is erased from; often the same object as ``concept``
    empty: Text


def prepare(model: Model, concepts: Sequence[Concept], settings: Settings) -> list[list[Example]]:
    """The examples of each concept."""
    empty, source = model.encode(Prompt("", "")), []
    if settings.erase_from.strip():
        source = [model.encode(Prompt(settings.erase_from, settings.erase_from, plain=False))]

    def example(prompt: Prompt) -> Example:
        concept, *texts = equal_lengths([model.encode(prompt), *source, empty])
        return Example(concept, texts[0] if source else concept, texts[-1])

    return [[example(prompt) for prompt in concept.training_prompts()] for concept in concepts]


def equal_lengths(texts: Sequence[Text]) -> Sequence[Text]:
    """Prompts of different numbers of 77-token chunks, repeated to the same number of tokens.

    Attention to a context that is repeated whole gives the same as to the context itself. Texts
    of hosts that take one prompt a forward keep their lengths.
    """
    if texts[0].alone:
        return texts
    length = math.lcm(*(text.context.shape[1] for text in texts))
    return [
        replace(text, context=text.context.repeat(1, length // text.context.shape[1], 1))
        for text in texts
    ]


Pick = tuple[Example, torch.Tensor, int, int]  # noise [B, C, h, w], sampling steps, time step


class Batches:
    """Endless training batches: prompts in shuffled orders, each with a partial sampling for it."""

    def __init__(
        self,
        examples: Sequence[Sequence[Example]],
        settings: Settings,
        denoiser: Denoiser,
        switch: Switch,
        side: int,
        channels: int = 4,
    ):
        self.settings, self.denoiser, self.switch = settings, denoiser, switch
        self.shape = settings.batch, channels, side, side
        self.generator = torch.Generator().manual_seed(settings.seed)
        prompts = [shuffled_cycle(each, self.generator) for each in examples]
        self.examples = shuffled_cycle(prompts, self.generator)
        # Sampling stops at times[k]; bin k reaches down to times[k + 1], not included.
        self.times = [*trailing_timesteps(len(denoiser.schedule), settings.sampling_steps), -1]

    def __call__(self) -> tuple[Example, torch.Tensor, int]:
        """An ``Example``, x_t [B, C, h, w] and its t."""
        return self.sample(*self.pick())

    def pick(self) -> Pick:
        """All that is random in a batch."""
        example = next(next(self.examples))
        k = self._number(0, self.settings.sampling_steps)
        exact = self.settings.timesteps == EXACT
        t = self.times[k] if exact else self._number(self.times[k + 1] + 1, self.times[k] + 1)
        return example, torch.randn(self.shape, generator=self.generator), k, t

    def sample(
        self, example: Example, noise: torch.Tensor, k: int, t: int
    ) -> tuple[Example, torch.Tensor, int]:
        """The batch of a ``pick``: x_t after the first k sampling steps of c_from."""
        noise = noise.to(self.denoiser.device)
        text = expand(example.source, len(noise))
        predict = guided(self.denoiser, text, example.empty, self.settings.guidance)
        frozen = self.settings.sample_from == FROZEN
        with self.switch.off() if frozen else nullcontext():
            steps = self.settings.sampling_steps
            x_t = self.denoiser.schedule.partial_sample(predict, noise, steps, k)
        return example, x_t, t

    def _number(self, start: int, end: int) -> int:
        return int(torch.randint(start, end, (1,), generator=self.generator))


@method_run(Settings)
def run(task: Task, options: TrainingOptions = TrainingOptions()) -> ForgetPatch:
    """Train a patch with which the concepts' prompts lead away from them.

    Args, errors: see ``methods.forget``. Words to keep need ``protect``.
    """
    model, concepts, settings = task.model, task.concepts, task.settings
    scope, family = SCOPES[settings.layers], model.family
    downs = protected_downs(task, scope)  # both refuse before any work
    in_scope(family, scope)
    examples = prepare(model, concepts, settings)
    side = (settings.size or family.resolution) // family.latent_factor

    def open_loss(
        denoiser: Denoiser, switch: Switch, split: bool
    ) -> AbstractContextManager[tuple[Draw, LossOf]]:
        batches = Batches(examples, settings, denoiser, switch, side, family.latent_channels)

        def loss_of(pick: Pick) -> Iterator[torch.Tensor]:
            example, x_t, t = batches.sample(*pick)
            parts = x_t.split(1 if split else len(x_t))
            for part in parts:
                yield esd_loss(denoiser, switch, example, part, t, settings.eta) / len(parts)

        return nullcontext((batches.pick, loss_of))

    probe_inputs: list[ProbeInput] = []
    if family.known:
        prompt, latent = concepts[0].training_prompts()[0], torch.zeros(1, 4, side, side)
        probe_inputs = [(model.encode(prompt), concept_flags(model, prompt), latent)]
    # Adam as released: no weight decay, no clipping.
    config = AdamWConfig(settings.lr, weight_decay=0.0, max_norm=math.inf)
    return train_patch(task, scope, open_loss, options, config, probe_inputs, downs)


def esd_loss(
    denoiser: Denoiser, switch: Switch, example: Example, x_t: torch.Tensor, t: int, eta: float
) -> torch.Tensor:
    """ESD's loss for x_t [B, C, h, w] at the time step t."""
    count = len(x_t)
    texts = [example.source, example.concept, example.empty]
    with switch.off(), torch.no_grad():
        frozen = predictions(denoiser, x_t, t, texts[example.source is example.concept :])
    predicted = denoiser.predict_noise(x_t, torch.full((count,), t), expand(example.source, count))
    return esd(predicted, frozen[0], frozen[-2], frozen[-1], eta)
