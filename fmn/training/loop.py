"""The one training loop. Methods give it parameters and a loss."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from ..errors import NonFiniteLoss
from ..progress import OnStep, StepProgress, ignore

MAX_LOSS_SCALE = 1024.0
Moments = dict[str, torch.Tensor]  # AdamW's exp_avg, exp_avg_sq and step of one parameter
# The loss of a step, or the parts that it is the sum of, which then are in memory one at a time.
Loss = torch.Tensor | Iterable[torch.Tensor]
LossAt = Callable[[int], Loss]  # from a step's index, from 0


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW as the released Forget-Me-Not uses it; users can only set the learning rate."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_norm: float = 1.0  # gradients are clipped to this 2-norm
    linear_decay: bool = False  # the learning rate falls linearly to zero


@dataclass(frozen=True)
class LoopState:
    """What it takes to resume a loop, beside the parameters."""

    losses: list[float]  # one a finished step
    attempts: int  # how often the loss was computed; more than steps if float16 overflowed
    loss_scale: float  # see ``Trainer``
    moments: list[Moments | None]  # of each parameter, None for those that never had a gradient


class Trainer:
    """AdamW with gradient clipping and loss scaling, which undoes a step that is not finite.

    Args:
        parameters: float32 tensors that require grad.
        loss_scale: the loss is multiplied by it for the backward pass, and gradients divided
            again, so that a float16 model does not lose small ones (Micikevicius et al. 2018,
            section 3.2). Halved whenever it makes gradients overflow; powers of two change no
            float32 result.
        resume_state: of an earlier run, whose parameters are in place already.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        config: AdamWConfig,
        total: int,
        loss_scale: float = 1.0,
        resume_state: LoopState | None = None,
    ):
        self.parameters, self.config, self.total = list(parameters), config, total
        own = asdict(config)
        given = {name: own[name] for name in ("lr", "betas", "eps", "weight_decay")}
        self.adamw = torch.optim.AdamW(self.parameters, **given)
        self.losses: list[float] = []
        self.attempts, self.loss_scale = 0, loss_scale
        if resume_state:
            self.losses, self.attempts = list(resume_state.losses), resume_state.attempts
            self.loss_scale = resume_state.loss_scale
            load_moments(self.adamw, resume_state.moments)

    def state(self) -> LoopState:
        """The state after the last finished step; its moments change with the next one."""
        moments = [self.adamw.state.get(parameter) for parameter in self.parameters]
        return LoopState(self.losses, self.attempts, self.loss_scale, moments)

    def run(self, loss_at: LossAt) -> Iterator[StepProgress]:
        """Minimise the loss, yielding after each step.

        Raises:
            NonFiniteLoss: the loss or its gradient is not finite. The parameters are then those
                of the last step that was.
        """
        last_good = [parameter.detach().clone() for parameter in self.parameters]
        start, resumed_at = time.monotonic(), len(self.losses)
        while len(self.losses) < self.total:
            self.adamw.zero_grad(set_to_none=True)
            loss, norm = self._backward(loss_at(len(self.losses))), math.nan
            self.attempts += 1
            if math.isfinite(loss):
                norm = self._clip()
            if math.isfinite(loss) and not math.isfinite(norm) and self.loss_scale > 1:
                self.loss_scale /= 2
                continue
            if not math.isfinite(norm):
                _copy(last_good, self.parameters)
                raise NonFiniteLoss(
                    f"The loss or its gradient is not finite at step {len(self.losses) + 1} of "
                    f"{self.total} (lr {self.config.lr:g}): lower the learning rate, or load the "
                    "model in float32.",
                    self.losses,
                )
            _copy(self.parameters, last_good)
            if self.config.linear_decay:
                rate = self.config.lr * (1 - len(self.losses) / self.total)
                self.adamw.param_groups[0]["lr"] = rate
            self.adamw.step()
            self.losses.append(loss)
            done = len(self.losses)
            left = (time.monotonic() - start) / (done - resumed_at) * (self.total - done)
            yield StepProgress(done, self.total, self.losses, left)

    def _backward(self, loss: Loss) -> float:
        """Add up gradients, and return the value of the loss."""
        value = 0.0
        for part in (loss,) if isinstance(loss, torch.Tensor) else loss:
            value += part.item()
            if not math.isfinite(value):
                break
            (part * self.loss_scale).backward()
        return value

    def _clip(self) -> float:
        """Divide gradients by the loss scale and clip them; returns their norm before clipping."""
        for parameter in self.parameters:
            if parameter.grad is not None and self.loss_scale != 1:
                parameter.grad /= self.loss_scale
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_norm))


def train(
    parameters: Sequence[torch.Tensor],
    loss_at: LossAt,
    steps: int,
    config: AdamWConfig,
    on_step: OnStep = ignore,
    loss_scale: float = 1.0,
) -> list[float]:
    """Minimise a loss from the start to the end, and return the losses; see ``Trainer``."""
    trainer = Trainer(parameters, config, steps, loss_scale)
    for progress in trainer.run(loss_at):
        on_step(progress)
    return trainer.losses


def initial_loss_scale(module: torch.nn.Module) -> float:
    """The loss scale to begin with, by a module that the loss goes through."""
    return MAX_LOSS_SCALE if module.weight.dtype == torch.float16 else 1.0


def load_moments(optimizer: torch.optim.Optimizer, moments: Sequence[Moments | None]) -> None:
    """Set the state of an Adam or AdamW: the moments of each parameter, None for those without."""
    state = optimizer.state_dict()
    state["state"] = {i: own for i, own in enumerate(moments) if own is not None}
    optimizer.load_state_dict(state)


@torch.no_grad()
def _copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    for source, target in zip(sources, targets):
        target.copy_(source)
