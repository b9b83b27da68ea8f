"""The one training loop. Methods give it parameters and a loss."""

import math
import time
from dataclasses import dataclass

import torch

from ..errors import NonFiniteLoss

TOP_SCALE = 1024.0


@dataclass(frozen=True)
class Optimiser:
    """AdamW as the released Forget-Me-Not uses it; only the learning rate is a user's business."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_norm: float = 1.0  # gradients are scaled down to this 2-norm
    decay: bool = False  # the learning rate falls to zero along a line


@dataclass(frozen=True)
class Step:
    """What the progress callback gets after every step."""

    index: int  # from 1
    total: int
    losses: list[float]
    seconds_left: float
    before: object = None  # the first concept's ``probe.Attention`` before training, and
    now: object = None  # when last looked at
    loop: object = None  # ``Loop``; good until the next step
    training: object = None  # ``training.Training``, to draw with or to save; None where none is
    note: str = ""  # on memory


@dataclass(frozen=True)
class Loop:
    """Where a loop is. With the parameters, all that it needs to go on later.

    Attributes:
        losses: one a finished step.
        tries: how often the loss was asked for; more than steps if float16 overflowed.
        scale: see ``train``.
        moments: AdamW's state of each parameter, None for those that never had a gradient.
    """

    losses: list
    tries: int
    scale: float
    moments: list


def train(parameters, loss_at, steps, optimiser, on_step=lambda step: None, scale=1.0, begun=None):
    """Minimise ``loss_at(step)``; returns the losses.

    Args:
        parameters: list of float32 tensors that require grad.
        loss_at: function from the step's index (from 0) to a scalar loss, or to a generator of
            the parts that it is the sum of, which then are in memory one at a time.
        on_step: called after each step; whatever it raises ends training.
        scale: the loss is multiplied by it for the backward pass, and gradients divided again, so
            that a float16 model does not lose small ones (Micikevicius et al. 2018, section 3.2).
            Halved whenever it makes gradients overflow; powers of two change no float32 result.
        begun: ``Loop`` of a run to go on with; ``parameters`` are as it left them.

    Raises:
        NonFiniteLoss: the loss or its gradient is not finite. The parameters are then those of
            the last step that was.
    """
    adamw = torch.optim.AdamW(
        parameters,
        lr=optimiser.lr,
        betas=optimiser.betas,
        eps=optimiser.eps,
        weight_decay=optimiser.weight_decay,
    )
    losses, tries = [], 0
    if begun:
        losses, tries, scale = list(begun.losses), begun.tries, begun.scale
        set_moments(adamw, begun.moments)
    good = [parameter.detach().clone() for parameter in parameters]
    start, done = time.monotonic(), len(losses)
    while len(losses) < steps:
        adamw.zero_grad(set_to_none=True)
        value, norm = _backward(loss_at(len(losses)), scale), math.nan
        tries += 1
        if math.isfinite(value):
            norm = _clipped(parameters, scale, optimiser.max_norm)
        if math.isfinite(value) and not math.isfinite(norm) and scale > 1:
            scale /= 2
            continue
        if not math.isfinite(norm):
            _copy(good, parameters)
            raise NonFiniteLoss(
                f"The loss or its gradient is not finite at step {len(losses) + 1} of {steps} "
                f"(lr {optimiser.lr:g}): lower the learning rate, or load the model in float32.",
                losses,
            )
        _copy(parameters, good)
        if optimiser.decay:
            adamw.param_groups[0]["lr"] = optimiser.lr * (1 - len(losses) / steps)
        adamw.step()
        losses.append(value)
        left = (time.monotonic() - start) / (len(losses) - done) * (steps - len(losses))
        moments = [adamw.state.get(each) for each in parameters]
        loop = Loop(losses, tries, scale, moments)
        on_step(Step(len(losses), steps, losses, left, loop=loop))
    return losses


def scale_for(module):
    """The ``scale`` that ``train`` begins with, by a module that the loss goes through."""
    return TOP_SCALE if module.weight.dtype == torch.float16 else 1.0


def _backward(loss, scale):
    """Gradients of a loss, given whole or in parts; returns its value."""
    value = 0.0
    for part in (loss,) if isinstance(loss, torch.Tensor) else loss:
        value += part.item()
        if not math.isfinite(value):
            break
        (part * scale).backward()
    return value


def _clipped(parameters, scale, max_norm):
    """Divide gradients by the scale and clip them; returns their norm before clipping."""
    for parameter in parameters:
        if parameter.grad is not None and scale != 1:
            parameter.grad /= scale
    return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def set_moments(adamw, moments):
    """Give an Adam or AdamW the state of each of its parameters, None for those without."""
    state = adamw.state_dict()
    state["state"] = {i: own for i, own in enumerate(moments) if own is not None}
    adamw.load_state_dict(state)


@torch.no_grad()
def _copy(sources, targets):
    for source, target in zip(sources, targets):
        target.copy_(source)
