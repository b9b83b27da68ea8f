"""What the methods that train share: adapters on the layers of a scope, trained to a patch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch

from ..concepts.concept import Concept
from ..errors import ForgetError
from ..models.adapters import FullAdapter, LayerModule, LowRankAdapter, Switch, attached
from ..models.attention_maps import AttentionProbe, ProbeInput
from ..models.families import Family, Layer, layers
from ..models.interface import UNet, UNetModel
from ..models.module_patching import checkpointed
from ..patches.patch import ForgetPatch
from ..progress import OnStep, StepProgress
from .loop import AdamWConfig, Loss, initial_loss_scale
from .memory import Estimate, Plan, measure_activations, plans, train_with_retry
from .run import Adapters, Task, TrainingOptions, TrainingRun, adapter_parameters

T = TypeVar("T")
SCOPES: dict[str, Callable[[Layer], bool]] = {
    "kv": lambda layer: layer.is_key_or_value,
    "attention": lambda layer: layer.is_cross_attention,
    "not-attention": lambda layer: not layer.is_cross_attention,
    "unet": lambda layer: True,
}
# The first concept's attention is measured so many times a run, or every so many steps, if that is
# more often. Each time costs a forward pass.
MEASUREMENTS, STEPS_BETWEEN = 7, 25
Draw = Callable[[], Any]  # draws the batch of a step, of whatever the method trains on
LossOf = Callable[[Any], Loss]  # its loss
OpenLoss = Callable[[UNet, Switch, bool], AbstractContextManager[tuple[Draw, LossOf]]]


def in_scope(family: Family, scope: str) -> list[Layer]:
    """The U-Net layers a scope trains, in forward order.

    ``kv``: keys and values of cross-attention. ``attention``: all of cross-attention.
    ``not-attention``: all but cross-attention. ``unet``: every Linear and Conv2d.

    Raises:
        ForgetError: the layers of this part of the model are unknown.
    """
    every = layers(family)
    chosen = [layer for layer in every if SCOPES[scope](layer)]
    if not chosen or (scope == "not-attention" and len(chosen) == len(every)):
        raise ForgetError(
            f"{family.title} has no layers that are known to do this part alone: set layers to all."
        )
    return chosen


def reference_latents(model: UNetModel, concept: Concept, side: int) -> torch.Tensor:
    """Latents [N, 4, h, w] of the concept's pictures, which it has; ``side`` pixels wide (0: the
    family's).

    Raises:
        ForgetError: the VAE is another model's.
    """
    images = cast(torch.Tensor, concept.images)
    latents = model.encode_images(images, side or model.family.resolution)
    if latents.shape[1] != 4:
        raise ForgetError(
            f"This VAE gives {latents.shape[1]} channels, but {model.family.title} reads 4: "
            "use the VAE of the same checkpoint."
        )
    return latents


def make_adapters(
    module_of: Callable[[str], LayerModule],
    names: Sequence[str],
    settings: Any,
    device: torch.device,
    downs: Mapping[str, torch.Tensor] | None = None,
) -> Adapters:
    """Fresh adapters: layer name -> ``LowRankAdapter``, or ``FullAdapter`` if the settings say so.

    Args:
        settings: has ``rank``, ``seed``, and may have ``full_weights``.
        downs: layer name -> [r, in], fixed lora_down matrices.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    if getattr(settings, "full_weights", False):
        return {name: FullAdapter(module_of(name), device) for name in names}
    return {
        name: LowRankAdapter(
            module_of(name), settings.rank, generator, device, (downs or {}).get(name)
        )
        for name in names
    }


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
    model: UNetModel,
    concepts: Sequence[Concept],
    settings: Any,
    scope: str,
    open_loss: OpenLoss,
    on_step: OnStep,
    options: TrainingOptions,
    config: AdamWConfig | None = None,
    probe_inputs: Sequence[ProbeInput] = (),
    downs: Mapping[str, torch.Tensor] | None = None,
    forwards: int = 1,
) -> ForgetPatch:
    """Train adapters on a U-Net and make the patch.

    Args:
        model: of unknown families a ``Model`` is enough.
        settings: a method's, with ``steps`` (a concept), ``lr``, ``rank``, ``seed``,
            ``checkpointing``, and perhaps ``batch``.
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
    total, batch = settings.steps * len(concepts), getattr(settings, "batch", 1)
    options.check_steps(total)  # before any work
    task, config = Task.of(model, concepts, settings), config or AdamWConfig(settings.lr)
    with model.borrow_denoiser() as denoiser:
        names = _trained_names(model.family, denoiser, scope)
        given = denoiser.module, names, settings, denoiser.device, downs
        report = _AttentionReport(denoiser, probe_inputs, on_step, total)

        def train(plan: Plan, message: str) -> TrainingRun:
            report.memory, adapters = message, make_adapters(*given)
            blocks = denoiser.checkpoint_blocks() if plan.checkpointing else []
            with (
                attached(adapters, denoiser.module) as switch,
                checkpointed(blocks, in_place=not model.family.known),
                open_loss(denoiser, switch, plan.split_batch) as (draw, loss_of),
            ):
                for _ in range(options.batches_drawn):
                    draw()
                scale = initial_loss_scale(denoiser.module(names[0]))
                run = TrainingRun(task, adapters, switch, options, config, total, scale, denoiser)
                run.train(lambda index: loss_of(draw()), report)
                return run

        measured = model.family, denoiser, make_adapters(*given), probe_inputs
        estimate_of = _estimator(*measured, batch, forwards)
        ordered = plans(settings.checkpointing, batch)
        run = train_with_retry(train, ordered, estimate_of, denoiser.device)
    return run.finish()


def _trained_names(family: Family, denoiser: UNet, scope: str) -> list[str]:
    """Of the scope's layers; the first of inpainting and editing variants has another shape, and is
    not trained."""
    return [
        layer.name
        for layer in in_scope(family, scope)
        if tuple(denoiser.module(layer.name).weight.shape) == tuple(layer.shape)
    ]


def _estimator(
    family: Family,
    denoiser: UNet,
    adapters: Adapters,
    probe_inputs: Sequence[ProbeInput],
    prompts: int,
    forwards: int,
) -> Callable[[Plan], Estimate] | None:
    """Function from a plan to its ``Estimate``, by a forward pass of the first prompt."""
    if not (probe_inputs and family.known):
        return None
    text, _, latent = probe_inputs[0]
    t = torch.tensor([len(denoiser.schedule) // 2])
    x = latent[:1].to(denoiser.device)
    weights = [denoiser.module(layer.name).weight for layer in layers(family)]
    with attached(adapters, denoiser.module):
        activations = measure_activations(
            lambda: denoiser.predict_noise(x, t, text), denoiser.checkpoint_blocks(), weights
        )
    trained = sum(parameter.nbytes for parameter in adapter_parameters(adapters))
    known = sum(weight.nbytes for weight in weights)
    return partial(Estimate.of, known, trained, activations, prompts=prompts, forwards=forwards)


class _AttentionReport:
    """Adds the first concept's attention, measured now and then, to the progress of a step."""

    def __init__(
        self, denoiser: UNet, probe_inputs: Sequence[ProbeInput], on_step: OnStep, total: int
    ):
        self.denoiser, self.on_step = denoiser, on_step
        self.every = max(1, min(total // MEASUREMENTS, STEPS_BETWEEN))
        self.probe, self.now, self.memory = None, None, ""
        if probe_inputs:
            alphas = denoiser.alphas_cumprod
            self.probe = AttentionProbe(probe_inputs[:1], alphas, steps=(0.5,))
            self.now = self.probe.measure(denoiser)[0]
        self.before = self.now

    def __call__(self, progress: StepProgress) -> None:
        measured = progress.index % self.every == 0 or progress.index == progress.total
        if self.probe and measured:
            self.now = self.probe.measure(self.denoiser)[0]
        self.on_step(
            replace(
                progress, attention_before=self.before, attention_now=self.now, memory=self.memory
            )
        )
