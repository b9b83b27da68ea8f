"""A training run: the loop over adapters, its best step, and the patch that it ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import ForgetError, NonFiniteLoss
from ..models.adapters import FullAdapter, LayerModule, LowRankAdapter, Switch
from ..models.interface import UNet
from ..patches.patch import ForgetPatch, save_patch
from ..patches.task import Task
from ..progress import OnStep, StepProgress
from .loop import AdamWConfig, LossAt, Moments, Trainer, initial_loss_scale
from .resume import Best, ExtraState, TrainingState, save_state, state_path

SMOOTHED = 10  # losses whose mean decides which step is best
Adapters = Mapping[str, LowRankAdapter | FullAdapter]  # by layer name


@dataclass(frozen=True)
class TrainingOptions:
    """What a caller can ask of any method that trains, beside the method's settings."""

    resume: TrainingState | None = None  # of an earlier run
    # The patch is that of the step with the lowest mean of the last ``SMOOTHED`` losses.
    keep_best: bool = False
    # Called after each step with the run itself, to save it or to draw with it.
    after_step: Callable[[StepProgress, TrainingRun], None] | None = None

    @property
    def batches_drawn(self) -> int:
        """Batches that the resumed run has drawn; drawn again, they leave the same generator."""
        return self.resume.record["tries"] if self.resume else 0

    def check_steps(self, steps: int) -> None:
        """Raise a ``ForgetError`` if the resumed run has no step left of so many in all."""
        if self.resume and len(self.resume.losses) >= steps:
            raise ForgetError(
                f"'{self.resume.name}' has {len(self.resume.losses)} finished steps and {steps} "
                "are asked for: set more steps."
            )


class TrainingRun:
    """Adapters in training, from their start or a resumed state; use it while they are attached.

    Args:
        switch: turns the adapters off.
        steps: in all, with those of the resumed run.
        module: that the loss goes through; see ``initial_loss_scale``.
        denoiser: the U-Net in training, to draw with; None if the text encoder is trained.
        make_patch: function from the losses to the patch; None: the adapters are all of it.
        extra_state: function that gives what else learns and is no part of the patch, as it is
            now: name -> (tensor, its moments or None).

    Attributes:
        best: of ``TrainingOptions.keep_best``.
        extra_moments: name -> moments that the resumed run left for ``extra_state``.
    """

    def __init__(
        self,
        task: Task,
        adapters: Adapters,
        switch: Switch,
        options: TrainingOptions,
        config: AdamWConfig,
        steps: int,
        module: LayerModule,
        denoiser: UNet | None = None,
        make_patch: Callable[[Sequence[float]], ForgetPatch] | None = None,
        extra_state: Callable[[], ExtraState] = dict,
    ):
        self.task, self.options, self.switch, self.denoiser = task, options, switch, denoiser
        self.make_patch = make_patch or (lambda losses: _patch(task, adapters, losses))
        self.extra_state = extra_state
        self.parameters = {
            f"{name}.{part}": parameter
            for name, adapter in adapters.items()
            for part, parameter in adapter.named_parameters()
        }
        self.error: NonFiniteLoss | None = None
        self.best: Best | None = None
        self.extra_moments: dict[str, Moments | None] = {}
        resume_state = None
        if options.resume:
            options.check_steps(steps)
            resume_state = options.resume.restore(self.parameters)
            self.best = options.resume.best() if options.keep_best else None
            extra = {name: tensor for name, (tensor, _) in extra_state().items()}
            self.extra_moments = options.resume.restore_extra(extra)
        parameters = list(self.parameters.values())
        scale = initial_loss_scale(module)
        self.trainer = Trainer(parameters, config, steps, scale, resume_state)

    def train(self, loss_at: LossAt, on_step: OnStep) -> None:
        """Train the adapters in place.

        Raises:
            NonFiniteLoss: in the first two steps; later ones are raised by ``finish``, which has
                a patch to rescue.
        """
        try:
            for progress in self.trainer.run(loss_at):
                if self.options.keep_best:
                    self._keep_best()
                on_step(replace(progress, best_step=self.best.step if self.best else None))
                if self.options.after_step:
                    self.options.after_step(progress, self)
        except NonFiniteLoss as error:
            if len(error.losses) < 2:
                raise
            self.error = error

    def _keep_best(self) -> None:
        if len(self.losses) < SMOOTHED:
            return
        mean = sum(self.losses[-SMOOTHED:]) / SMOOTHED
        if self.best is None or mean < self.best.loss:
            kept = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.best = Best(mean, len(self.losses), kept)

    @property
    def losses(self) -> list[float]:
        return list(self.trainer.losses)

    def state(self) -> TrainingState:
        """The state after the last step, to resume from."""
        return TrainingState.of(
            self.task.record(), self.parameters, self.trainer.state(), self.best, self.extra_state()
        )

    def patch(self) -> ForgetPatch:
        """The patch after the last step."""
        return self.make_patch(self.losses)

    def finish(self) -> ForgetPatch:
        """The patch that the run ends in.

        Raises:
            NonFiniteLoss: training diverged; it carries the patch of the last good step.
        """
        if self.error:
            self.error.patch = self.patch()
            raise self.error
        if self.best is None:
            return self.patch()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best.parameters[name])
        return self.make_patch(self.losses[: self.best.step])


class SaveEvery:
    """Saves the patch and the training state every so many steps, 0 never; use as ``after_step``.

    The state is several times as large as the patch, so only the newest of a run stays.
    ``path_of`` gives the file of the patch for a step's index.
    """

    def __init__(self, every: int, path_of: Callable[[int], str | Path]):
        self.every, self.path_of = every, path_of
        self.newest: Path | None = None

    def __call__(self, progress: StepProgress, run: TrainingRun) -> None:
        last = progress.index == progress.total
        if not self.every or (progress.index % self.every and not last):
            return
        path = save_patch(run.patch(), self.path_of(progress.index))
        state = save_state(run.state(), state_path(path))
        if self.newest and self.newest != state:
            self.newest.unlink(missing_ok=True)
        self.newest = state


def _patch(task: Task, adapters: Adapters, losses: Sequence[float]) -> ForgetPatch:
    """The patch of trained adapters."""
    changes, largest_error = {}, 0.0
    for name, adapter in adapters.items():
        up, down, error = adapter.factors(task.settings.rank)
        changes[name] = up.cpu().clone(), down.cpu().clone()
        largest_error = max(largest_error, error)
    return task.patch(changes, losses, largest_error)


def adapter_parameters(adapters: Adapters) -> list[torch.nn.Parameter]:
    """The trainable parameters of all adapters."""
    return [p for adapter in adapters.values() for p in adapter.parameters()]
