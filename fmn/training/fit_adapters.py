"""What the methods that train share: adapters on the layers of a scope, trained to a patch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch

from ..concepts.concept import Concept
from ..errors import ForgetError
from ..models.adapters import FullAdapter, LowRankAdapter, Switch, attached
from ..models.attention_maps import AttentionProbe, ProbeInput
from ..models.families import Family, Layer, layers
from ..models.interface import Model, NoiseSchedule, TextEncoder, UNet, UNetModel
from ..models.module_patching import checkpointed
from ..patches.patch import ForgetPatch
from ..patches.task import Task
from ..progress import OnStep, StepProgress
from .loop import AdamWConfig, Loss
from .memory import Activations, Estimate, Plan, measure_activations, plans, train_with_retry
from .run import Adapters, TrainingOptions, TrainingRun, adapter_parameters

T = TypeVar("T")
SCOPES: dict[str, Callable[[Layer], bool]] = {
    "kv": lambda layer: layer.is_key_or_value,  # of cross-attention
    "attention": lambda layer: layer.is_cross_attention,  # all of it
    "not-attention": lambda layer: not layer.is_cross_attention,
    "unet": lambda layer: True,  # every Linear and Conv2d
}
# The first concept's attention is measured so many times a run, or every so many steps, if that is
# more often. Each time costs a forward pass.
MEASUREMENTS, STEPS_BETWEEN = 7, 25
Draw = Callable[[], Any]  # draws the batch of a step, of whatever the method trains on
LossOf = Callable[[Any], Loss]  # its loss
OpenLoss = Callable[[UNet, Switch, bool], AbstractContextManager[tuple[Draw, LossOf]]]


def in_scope(family: Family, scope: str) -> list[Layer]:
    """The U-Net layers that one of ``SCOPES`` trains, in forward order.

    Raises:
        ForgetError: the layers of this part of the model are unknown.
    """
    every = layers(family)
    chosen = [layer for layer in every if SCOPES[scope](layer)]
    if not chosen or (scope == "not-attention" and len(chosen) == len(every)):
        raise ForgetError(
            f"{family.title} has no layers known to do this part alone: choose more layers."
        )
    return chosen


def reference_latents(model: Model, concept: Concept, side: int) -> torch.Tensor:
    """Latents [N, 4, h, w] of the concept's pictures, which it has; ``side`` pixels wide (0: the
    family's).

    Raises:
        ForgetError: the VAE is another model's, or the model none of those whose VAE we read.
    """
    if not model.family.known:
        raise ForgetError(
            f"Pictures cannot be read for {model.family.title}: set references to 'samples' or "
            "'zeros'."
        )
    images = cast(torch.Tensor, concept.images)
    latents = cast(UNetModel, model).encode_images(images, side or model.family.resolution)
    if latents.shape[1] != 4:
        raise ForgetError(
            f"This VAE gives {latents.shape[1]} channels, but {model.family.title} reads 4: "
            "use the VAE of the same checkpoint."
        )
    return latents


def make_adapters(
    owner: UNet | TextEncoder,
    names: Sequence[str],
    settings: Any,
    downs: Mapping[str, torch.Tensor] | None = None,
) -> Adapters:
    """Fresh adapters: layer name -> ``LowRankAdapter``, or ``FullAdapter`` if the settings say so.

    Args:
        settings: has ``rank``, ``seed``, and may have ``full_weights``.
        downs: layer name -> [r, in], fixed lora_down matrices.
    """
    if getattr(settings, "full_weights", False):
        return {name: FullAdapter(owner.module(name), owner.device) for name in names}
    given = settings.rank, torch.Generator().manual_seed(settings.seed), owner.device
    downs = downs or {}
    return {name: LowRankAdapter(owner.module(name), *given, downs.get(name)) for name in names}


def noise_one(
    latents: torch.Tensor, schedule: NoiseSchedule, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t [1, C, h, w], t [1] and what should be predicted, of one of the latents [N, C, h, w]."""
    index = torch.randint(len(latents), (1,), generator=generator)
    t = torch.randint(len(schedule), (1,), generator=generator)
    noise = torch.randn(latents[index].shape, generator=generator)
    x_t, target = schedule.noised(latents[index], noise, t)
    return x_t, t, target


def shuffled_cycle(
    values: Sequence[T], generator: torch.Generator, reverse: bool = False
) -> Iterator[T]:
    """The values in a shuffled order, then in another one, without end.

    Args:
        reverse: from the end of each order; patches depend on it.
    """
    while True:
        order = torch.randperm(len(values), generator=generator).tolist()
        for index in reversed(order) if reverse else order:
            yield values[index]


def train_patch(
    task: Task,
    scope: str,
    open_loss: OpenLoss,
    options: TrainingOptions,
    config: AdamWConfig | None = None,
    probe_inputs: Sequence[ProbeInput] = (),
    downs: Mapping[str, torch.Tensor] | None = None,
    forwards: int = 1,
) -> ForgetPatch:
    """Train adapters on a U-Net and make the patch.

    Args:
        task: its settings have ``steps`` (a concept), ``lr``, ``batch``, ``checkpointing`` and
            those of ``make_adapters``.
        scope: of ``SCOPES``.
        open_loss: function from the U-Net, its adapters' switch and whether prompts go one at a
            time, to a context manager of two functions: one draws a step's batch at random, which
            costs little, the other computes its loss.
        config: None takes AdamW as released with ``settings.lr``.
        probe_inputs: what ``AttentionProbe`` takes; progress has the attention of the first.
        downs: see ``make_adapters``.
        forwards: forward passes whose activations a step holds at once.

    Raises:
        ForgetError: memory ran out.
        NonFiniteLoss: training diverged; it carries the patch of the last good step.
    """
    settings, family = task.settings, task.model.family
    total, config = settings.steps * len(task.concepts), config or AdamWConfig(settings.lr)
    options.check_steps(total)  # before any work
    with task.model.borrow_denoiser() as denoiser:
        # The first layer of inpainting and editing variants has another shape: it is not trained.
        shapes = {layer.name: tuple(layer.shape) for layer in in_scope(family, scope)}
        names = [n for n, shape in shapes.items() if denoiser.module(n).weight.shape == shape]
        fresh = partial(make_adapters, denoiser, names, settings, downs)
        report = _AttentionReport(denoiser, probe_inputs, task.on_step, total)

        def train(plan: Plan, message: str) -> TrainingRun:
            report.memory, adapters = message, fresh()
            blocks = denoiser.checkpoint_blocks() if plan.checkpointing else []
            with (
                attached(adapters, denoiser.module) as switch,
                checkpointed(blocks, in_place=not family.known),
                open_loss(denoiser, switch, plan.split_batch) as (draw, loss_of),
            ):
                for _ in range(options.batches_drawn):
                    draw()
                module = denoiser.module(names[0])
                run = TrainingRun(task, adapters, switch, options, config, total, module, denoiser)
                run.train(lambda index: loss_of(draw()), report)
                return run

        estimate_of = None
        if probe_inputs and family.known:
            given = _estimated(family, denoiser, fresh(), probe_inputs[0])
            estimate_of = partial(Estimate.of, *given, prompts=settings.batch, forwards=forwards)
        ordered = plans(settings.checkpointing, settings.batch)
        run = train_with_retry(train, ordered, estimate_of, denoiser.device)
    return run.finish()


def _estimated(
    family: Family, denoiser: UNet, adapters: Adapters, probe_input: ProbeInput
) -> tuple[int, int, Activations]:
    """Bytes of the model's and of trained parameters, and a prompt's activations."""
    text, _, latent = probe_input
    t = torch.tensor([len(denoiser.schedule) // 2])
    x = latent[:1].to(denoiser.device)
    weights = [denoiser.module(layer.name).weight for layer in layers(family)]
    with attached(adapters, denoiser.module):
        activations = measure_activations(
            lambda: denoiser.predict_noise(x, t, text), denoiser.checkpoint_blocks(), weights
        )
    trained = sum(parameter.nbytes for parameter in adapter_parameters(adapters))
    return sum(weight.nbytes for weight in weights), trained, activations


class _AttentionReport:
    """Adds the first concept's attention, measured now and then, to the progress of a step."""

    def __init__(
        self, denoiser: UNet, probe_inputs: Sequence[ProbeInput], on_step: OnStep, total: int
    ):
        self.denoiser, self.on_step, self.memory = denoiser, on_step, ""
        self.every = max(1, min(total // MEASUREMENTS, STEPS_BETWEEN))
        self.probe = None
        if probe_inputs:
            self.probe = AttentionProbe(probe_inputs[:1], denoiser.alphas_cumprod, steps=(0.5,))
        self.before = self.now = self.probe.measure(denoiser)[0] if self.probe else None

    def __call__(self, progress: StepProgress) -> None:
        measured = progress.index % self.every == 0 or progress.index == progress.total
        if self.probe and measured:
            self.now = self.probe.measure(self.denoiser)[0]
        progress = replace(progress, attention_before=self.before, attention_now=self.now)
        self.on_step(replace(progress, memory=self.memory))
