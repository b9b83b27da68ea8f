"""Memory that is told before training, and what happens where it does not do."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fmn import fitting, plan
from fmn.attention import watch_attention
from fmn.concept import Concept
from fmn.errors import ForgetError
from fmn.fitting import make_adapters
from fmn.forwards import checkpointed
from fmn.lowrank import attached
from fmn.methods import esd, resteer
from fmn.model import cross_attention_names
from fmn.objectives import attention_resteering
from fmn.plan import Estimate, estimate, planned
from fmn.training import parameters_of

from .tiny import TINY, TinyModel, same_tensors, weights_of

CPU = torch.device("cpu")
DOG = Concept("dog")


def test_what_is_alive_is_counted_at_its_peak():
    a = torch.randn(100, 100, requires_grad=True)
    with plan._Alive() as alive:
        b = a @ a  # 40 kB, and 40 kB more
        c = (b + 1).view(-1)  # a view is no memory
        assert (alive.now, alive.most) == (80_000, 80_000)
        del b
        assert alive.now == 40_000
        del c
    assert (alive.now, alive.most) == (0, 80_000)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [64, 256])
def test_the_estimate_is_what_a_step_takes(checkpointing, size):
    """Counted on real tensors, in a real step."""
    model = TinyModel()
    settings = resteer.Settings(size=size)
    names = [f"{name}.to_k" for name in cross_attention_names(TINY)]
    text, flags = model.encode(DOG.training_prompts()[0]), torch.zeros(1, 77, dtype=torch.bool)
    flags[0, 4] = True
    x, t = torch.randn(1, 4, size // 8, size // 8), torch.tensor([500])
    with model.borrow() as borrowed:
        adapters = make_adapters(borrowed.module, names, settings, CPU)
        parameters = parameters_of(adapters)
        modules = [borrowed.module(name) for name in cross_attention_names(TINY)]
        blocks = borrowed.checkpoint_blocks() if checkpointing else []
        with (
            attached(adapters, borrowed.module),
            checkpointed(blocks),
            watch_attention(modules, "encoder_hidden_states") as watch,
        ):
            watch.aim(flags)

            def loss_of():
                return attention_resteering(watch.run(lambda: borrowed.denoise(x, t, text)))

            found = estimate(borrowed, TINY, parameters, loss_of)
            with plan._Alive() as alive:
                torch.autograd.grad(loss_of(), parameters)
    assert found.activations == pytest.approx(alive.most, rel=0.02)
    assert found.optimiser == 4 * 4 * sum(each.numel() for each in parameters)
    whole = sum(each.numel() for each in model.unet.parameters())
    assert 0.95 * whole < found.weights / 4 < whole  # without norms and biases


def test_a_model_that_goes_by_values_has_no_estimate():
    parameter = torch.ones(3, requires_grad=True)

    def loss_of():
        return parameter.sum() * parameter.detach().sum().item()

    with TinyModel().borrow() as borrowed:
        assert estimate(borrowed, TINY, [parameter], loss_of) is None


def train_that(fails=()):
    """A stand-in for training, and what it is called with; memory runs out in some calls."""
    calls = []

    def train(checkpointing, note):
        calls.append((checkpointing, note))
        if len(calls) in fails:
            raise torch.OutOfMemoryError
        return "trained"

    return train, calls


def needs(checkpointing):
    return Estimate(10**9, 10**9 if checkpointing else 4 * 10**9, 10**6)


@pytest.mark.parametrize("free, asked, used", [
    (5e9, False, False), (4e9, False, True), (1e9, False, True), (None, False, False),
    (1e9, True, True),
])  # fmt: skip
def test_the_plan_fits_the_free_memory(monkeypatch, free, asked, used):
    monkeypatch.setattr(plan, "free_memory", lambda device: free)
    train, calls = train_that()
    assert planned(train, asked, needs, CPU) == "trained"
    [(checkpointing, note)] = calls
    assert checkpointing is used and str(needs(used)) in note
    assert ("checkpointing was turned on" in note) == (used and not asked)


def test_memory_that_runs_out_is_told_and_training_begins_anew(monkeypatch, caplog):
    monkeypatch.setattr(plan, "free_memory", lambda device: None)
    train, calls = train_that(fails=[1])
    with caplog.at_level(logging.WARNING):
        assert planned(train, False, lambda _: None, CPU) == "trained"
    assert [checkpointing for checkpointing, _ in calls] == [False, True]
    told = "memory ran out, so training began anew with checkpointing"
    assert calls[1][1] == told and caplog.messages == [told]


@pytest.mark.parametrize("asked, fails", [(True, [1]), (False, [1, 2])])
def test_there_is_one_cheaper_plan(monkeypatch, asked, fails):
    monkeypatch.setattr(plan, "free_memory", lambda device: None)
    train, calls = train_that(fails)
    with pytest.raises(ForgetError, match="choose a smaller size"):
        planned(train, asked, lambda _: None, CPU)
    assert len(calls) == len(fails)


def test_other_errors_get_through(monkeypatch):
    def fails(checkpointing, note):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        planned(fails, False, lambda _: None, CPU)


@pytest.mark.parametrize("method, settings", [
    (resteer, resteer.Settings(steps=3)),
    (esd, esd.Settings(steps=3, sampling_steps=2)),
])  # fmt: skip
def test_a_method_whose_memory_runs_out(method, settings):
    """A stand-in for a GPU: the second forward in training raises. The patch is the same."""
    steps, model = [], TinyModel()
    before = weights_of(model.unet)
    expected = method.run(model, [DOG], settings)
    forward, calls = model.unet.mid_block.forward, []

    def runs_out(*args, **arguments):
        if torch.is_grad_enabled() and not isinstance(args[0], FakeTensor):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError
        return forward(*args, **arguments)

    model.unet.mid_block.forward = runs_out
    found = method.run(model, [DOG], settings, steps.append)
    assert [step.index for step in steps] == [1, 1, 2, 3]
    assert "ran out" not in steps[0].note and "began anew" in steps[1].note
    for name in expected.changes:
        torch.testing.assert_close(found.change_of(name), expected.change_of(name))
    assert same_tensors(weights_of(model.unet), before)


def test_estimates_are_told_and_kept(monkeypatch):
    monkeypatch.setattr(fitting, "ESTIMATES", {})
    steps = []
    resteer.run(TinyModel(), [DOG], resteer.Settings(steps=2), steps.append)
    (told,) = fitting.ESTIMATES.values()
    assert [step.note for step in steps] == [str(told)] * 2
    assert steps[0].note.startswith("memory: weights 0.00 GB, activations")
    monkeypatch.setattr(fitting, "estimate", None)  # it is not asked again
    resteer.run(TinyModel(), [DOG], resteer.Settings(steps=2), steps.append)
