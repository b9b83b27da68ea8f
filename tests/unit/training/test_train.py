import math

import pytest
import torch
from torch import nn

from fmn.errors import NonFiniteLoss
from fmn.models.adapters import FullAdapter, attached
from fmn.training.loop import AdamWConfig, train

from ..tiny import Cancelled

TARGET = torch.tensor([3.0, -1.0, 0.5])


def start():
    return [nn.Parameter(torch.tensor([0.5, 0.25, -1.0])), nn.Parameter(torch.tensor(2.0))]


def loss_of(parameters, index):
    vector, scale = parameters
    return ((scale * vector - TARGET) * (1 + index)).square().sum()


def by_hand(steps, lr, max_norm=1.0):
    """The released loop: AdamW and a clipped gradient."""
    parameters, losses = start(), []
    adamw = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    for index in range(steps):
        adamw.zero_grad()
        loss = loss_of(parameters, index)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        adamw.step()
        losses.append(loss.item())
    return parameters, losses


@pytest.mark.parametrize("lr", [1e-3, 0.5])
def test_equals_adamw_with_clipping(lr):
    parameters = start()
    losses = train(parameters, lambda index: loss_of(parameters, index), 5, AdamWConfig(lr))
    expected, expected_losses = by_hand(5, lr)
    assert losses == expected_losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected))


def test_clipping_matters_to_these_steps():
    # Else the test above would pass without it.
    assert not torch.equal(by_hand(5, 0.1)[0][0], by_hand(5, 0.1, max_norm=1e9)[0][0])


def test_gradients_do_not_add_up():
    parameters = start()
    parameters[0].grad = torch.full((3,), 1e6)
    train(parameters, lambda index: loss_of(parameters, index), 1, AdamWConfig(0.1))
    assert torch.equal(parameters[0], by_hand(1, 0.1)[0][0])


def test_parameters_without_gradient_only_stay():
    used, unused = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    train([used, unused], lambda index: used.square(), 3, AdamWConfig(0.1))
    assert unused.item() == 1.0 and used.item() < 1.0


def not_a_number(parameters):
    return parameters[0].sum() * math.nan


def infinite(parameters):
    return parameters[0].sum().exp() * math.inf


def bad_gradient(parameters):
    # sqrt(0) is 0, its slope is infinite: 0 * inf.
    return (parameters[0] - parameters[0]).sum().sqrt()


@pytest.mark.parametrize("bad", [not_a_number, infinite, bad_gradient])
@pytest.mark.parametrize("failing_step", [1, 2, 4])
def test_a_non_finite_loss_keeps_the_last_good_parameters(bad, failing_step):
    parameters, kept = start(), []

    def loss_at(index):
        if index + 1 == failing_step:
            return bad(parameters)
        kept.append([parameter.detach().clone() for parameter in parameters])
        return loss_of(parameters, index)

    with pytest.raises(NonFiniteLoss) as caught:
        train(parameters, loss_at, 6, AdamWConfig(0.1))
    message = str(caught.value)
    assert f"not finite at step {failing_step} of 6 (lr 0.1)" in message
    assert "lower the learning rate" in message
    assert caught.value.losses == by_hand(failing_step - 1, 0.1)[1]
    last_good = kept[-1] if kept else start()
    assert all(torch.equal(ours, good) for ours, good in zip(parameters, last_good))


def test_no_step_is_reported_for_a_non_finite_loss():
    parameters, seen = start(), []
    with pytest.raises(NonFiniteLoss):
        train(parameters, lambda index: not_a_number(parameters), 3, AdamWConfig(0.1), seen.append)
    assert seen == []


def test_on_step_is_called_after_every_step():
    parameters, seen = start(), []

    def on_step(progress):
        left = progress.seconds_left
        seen.append((progress.index, progress.total, list(progress.losses), left))

    losses = train(
        parameters, lambda index: loss_of(parameters, index), 4, AdamWConfig(0.1), on_step
    )
    assert [(index, total) for index, total, *_ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [so_far for _, _, so_far, _ in seen] == [losses[:i] for i in (1, 2, 3, 4)]
    assert all(left >= 0 for *_, left in seen)
    assert seen[-1][-1] == 0


def test_on_step_may_raise():
    parameters = start()

    def on_step(step):
        if step.index == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        train(parameters, lambda index: loss_of(parameters, index), 5, AdamWConfig(0.1), on_step)
    expected = by_hand(2, 0.1)[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected))


def test_bfloat16_masters_never_move_and_ours_do():
    """The trap: 2e-6 is far below half a unit in the last place of a bfloat16 near 0.5."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def make():
        layer = nn.Linear(16, 4, bias=False).bfloat16()
        nn.init.constant_(layer.weight, 0.5)
        return layer

    def loss(layer):
        return layer(x).float().square().sum()

    masters = make()
    train([masters.weight], lambda index: loss(masters), 35, AdamWConfig(2e-6))
    assert torch.equal(masters.weight, make().weight)

    layer = make()
    adapter = FullAdapter(layer, "cpu")
    with attached({"layer": adapter}, lambda name: layer):
        train([adapter.change], lambda index: loss(layer), 35, AdamWConfig(2e-6))
    # Each of Adam's steps is lr while the gradient keeps its sign.
    assert 30 * 2e-6 < adapter.change.abs().max() <= 35 * 2e-6 * 1.001
    assert torch.equal(layer.weight, make().weight)


@pytest.mark.parametrize("scale", [2.0, 1024.0])
def test_loss_scale_changes_nothing_in_float32(scale):
    def run(scale):
        weight = torch.nn.Parameter(torch.tensor([0.3, -2.0, 1e-3]))
        losses = train(
            [weight], lambda index: weight.square().sum(), 5, AdamWConfig(0.01), loss_scale=scale
        )
        return losses, weight.detach()

    (losses, weight), (scaled_losses, scaled_weight) = run(1.0), run(scale)
    assert losses == scaled_losses and torch.equal(weight, scaled_weight)


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is lost above 100, as float16's is above 65504."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.where(gradient.abs() > 100, torch.inf, gradient)


def test_loss_scale_is_halved_until_gradients_fit():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    tried, reported = [], []

    def loss_at(index):
        tried.append(index)
        return Overflow.apply(weight).sum()

    losses = train([weight], loss_at, 3, AdamWConfig(0.1), reported.append, 512.0)
    assert tried == [0, 0, 0, 0, 1, 2]  # 512, 256, 128 overflow; 64 does not
    assert len(losses) == len(reported) == 3
    with pytest.raises(NonFiniteLoss, match="at step 1 of 1"):
        train([weight], lambda index: Overflow.apply(weight * 200).sum() * 200, 1, AdamWConfig(0.1))
