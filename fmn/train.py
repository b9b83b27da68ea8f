"""The one training loop. Methods give it parameters and a loss."""

import math
import time
from dataclasses import dataclass

import torch

from .errors import NonFiniteLoss


@dataclass(frozen=True)
class Optimiser:
    """AdamW as the released Forget-Me-Not uses it; only the learning rate is a user's business."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_norm: float = 1.0  # gradients are scaled down to this 2-norm


@dataclass(frozen=True)
class Step:
    """What the progress callback gets after every step."""

    index: int  # from 1
    total: int
    losses: list[float]
    seconds_left: float
    before: object = None  # the first concept's ``probe.Attention`` before training, and
    now: object = None  # when last looked at


def train(parameters, loss_at, steps, optimiser, on_step=lambda step: None):
    """Minimise ``loss_at(step)``; returns the losses.

    Args:
        parameters: list of float32 tensors that require grad.
        loss_at: function from the step's index (from 0) to a scalar loss.
        on_step: called after each step; whatever it raises ends training.

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
    good = [parameter.detach().clone() for parameter in parameters]
    losses, start = [], time.monotonic()
    for index in range(steps):
        loss = loss_at(index)
        value = loss.item()
        adamw.zero_grad(set_to_none=True)
        if math.isfinite(value):
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, optimiser.max_norm)
        if not (math.isfinite(value) and torch.isfinite(norm)):
            with torch.no_grad():
                for parameter, kept in zip(parameters, good):
                    parameter.copy_(kept)
            raise NonFiniteLoss(
                f"The loss or its gradient is not finite at step {index + 1} of {steps} "
                f"(lr {optimiser.lr:g}): lower the learning rate, or load the model in float32.",
                losses,
            )
        with torch.no_grad():
            for parameter, kept in zip(parameters, good):
                kept.copy_(parameter)
        adamw.step()
        losses.append(value)
        left = (time.monotonic() - start) / (index + 1) * (steps - index - 1)
        on_step(Step(index + 1, steps, losses, left))
    return losses
