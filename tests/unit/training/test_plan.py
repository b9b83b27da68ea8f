"""Memory that is told before training, and what happens where it does not do."""

import logging
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import ablation, esd, resteer
from fmn.models.adapters import attached
from fmn.models.attention import watch_attention
from fmn.models.interface import cross_attention_names
from fmn.models.module_patching import checkpointed
from fmn.training import fit_adapters, memory
from fmn.training.fit_adapters import make_adapters
from fmn.training.losses import attention_resteering
from fmn.training.memory import Estimate, Plan, estimate, planned, plans
from fmn.training.run import parameters_of

from ..tiny import TINY, TinyModel, same_tensors, weights_of

CPU = torch.device("cpu")
DOG = Concept("dog")


def test_what_is_alive_is_counted_at_its_peak():
    a = torch.randn(100, 100, requires_grad=True)
    with memory._Alive() as alive:
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
    with model.borrow_denoiser() as denoiser:
        adapters = make_adapters(denoiser.module, names, settings, CPU)
        parameters = parameters_of(adapters)
        modules = [denoiser.module(name) for name in cross_attention_names(TINY)]
        blocks = denoiser.checkpoint_blocks() if checkpointing else []
        with (
            attached(adapters, denoiser.module),
            checkpointed(blocks),
            watch_attention(modules, "encoder_hidden_states") as watch,
        ):
            watch.aim(flags)

            def loss_of():
                return attention_resteering(watch.run(lambda: denoiser.predict_noise(x, t, text)))

            found = estimate(denoiser, TINY, parameters, loss_of)
            with memory._Alive() as alive:
                torch.autograd.grad(loss_of(), parameters)
    assert found.activations == pytest.approx(alive.most, rel=0.02)
    assert found.optimiser == 4 * 4 * sum(each.numel() for each in parameters)
    whole = sum(each.numel() for each in model.unet.parameters())
    assert 0.95 * whole < found.weights / 4 < whole  # without norms and biases


def test_a_model_that_goes_by_values_has_no_estimate():
    parameter = torch.ones(3, requires_grad=True)

    def loss_of():
        return parameter.sum() * parameter.detach().sum().item()

    with TinyModel().borrow_denoiser() as denoiser:
        assert estimate(denoiser, TINY, [parameter], loss_of) is None


def train_that(fails=()):
    """A stand-in for training, and what it is called with; memory runs out in some calls."""
    calls = []

    def train(plan, note):
        calls.append((memory, note))
        if len(calls) in fails:
            raise torch.OutOfMemoryError
        return "trained"

    return train, calls


def needs(plan):
    size = 4 * 10**9 // (2 if memory.apart else 1) // (2 if memory.checkpointing else 1)
    return Estimate(10**9, size, 10**6)


ASKED, APART, LEAST = Plan(False), Plan(False, apart=True), Plan(True, apart=True)


def test_plans_from_fast_to_little_memory():
    assert plans(False, 1) == [ASKED, Plan(True)] and plans(True, 1) == [Plan(True)]
    assert plans(False, 4) == [ASKED, APART, LEAST]
    assert plans(True, 4) == [Plan(True), LEAST]


@pytest.mark.parametrize("free, ways, used, told", [
    (5e9, plans(False, 4), ASKED, None),
    (4e9, plans(False, 4), APART, "prompts go one at a time, as 4.0 GB are free"),
    (2e9, plans(False, 4), LEAST, "checkpointing is on and prompts go one at a time, as 2.0"),
    (1e8, plans(False, 4), LEAST, "as 0.1 GB are free"),  # one can but try
    (4e9, plans(False, 1), Plan(True), "checkpointing is on, as 4.0 GB are free"),
    (1e8, plans(True, 1), Plan(True), None),
    (None, plans(False, 4), ASKED, None),
])  # fmt: skip
def test_the_plan_fits_the_free_memory(monkeypatch, free, ways, used, told):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    train, calls = train_that()
    assert planned(train, ways, needs, CPU) == "trained"
    [(found, note)] = calls
    assert found == used and note.startswith(str(needs(used)))
    assert told in note if told else note == str(needs(used))


def test_memory_that_runs_out_is_told_and_training_begins_anew(monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    train, calls = train_that(fails=[1])
    with caplog.at_level(logging.WARNING):
        assert planned(train, plans(False, 1), lambda _: None, CPU) == "trained"
    assert [found for found, _ in calls] == [ASKED, Plan(True)]
    told = "memory ran out, so training began anew: checkpointing is on"
    assert calls[1][1] == told and caplog.messages == [told]


@pytest.mark.parametrize("batch, asked, fails", [
    (1, True, [1]), (1, False, [1, 2]), (4, False, [1, 2]),
])  # fmt: skip
def test_it_begins_anew_once_in_the_way_that_takes_the_least(monkeypatch, batch, asked, fails):
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    train, calls = train_that(fails)
    with pytest.raises(ForgetError, match="choose a smaller size"):
        planned(train, plans(asked, batch), lambda _: None, CPU)
    assert len(calls) == len(fails) and calls[-1][0] == Plan(True, batch > 1)


@pytest.mark.parametrize("free, gives_back", [(17e9, False), (15e9, True), (1e8, True)])
def test_a_cpu_gives_freed_memory_back_where_there_is_little(monkeypatch, free, gives_back):
    asked = []
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    monkeypatch.setattr(memory, "has_heap", lambda: True)
    monkeypatch.setattr(
        memory, "heap", lambda gives_back: asked.append(gives_back) or nullcontext()
    )
    planned(train_that()[0], [ASKED], needs, CPU)
    planned(train_that()[0], [ASKED], lambda _: None, CPU)  # nothing is known: it stays as it is
    assert asked == [gives_back]


HOLES = """
import sys, torch
from fmn import memory
with memory.heap(gives_back=sys.argv[1] == "True"):
    before = memory._resident("VmRSS")
    kept = [torch.ones(1 << 19) for _ in range(100)]
    del kept[::2]
    print(memory._resident("VmRSS") - before)
"""


@pytest.mark.skipif(not memory.has_heap(), reason="the C library is not glibc")
@pytest.mark.parametrize("gives_back, low, high", [(False, 200e6, 230e6), (True, 95e6, 130e6)])
def test_what_becomes_of_freed_memory(gives_back, low, high):
    """Of a hundred blocks of 2 MB every other one is freed, which leaves holes."""
    command = [sys.executable, "-c", HOLES, str(gives_back)]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert low < int(done.stdout) < high


SAID = {
    "MPS": "MPS backend out of memory (MPS allocated: 9.06 GB, max allowed: 9.07 GB).",
    "Linux": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
    "memory: you tried to allocate 4000000000000000 bytes.",
    "Windows": "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: "
    "you tried to allocate 4194304 bytes.",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
}


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, SAID.values())])
def test_memory_that_runs_out_elsewhere_is_known_by_what_is_said(error):
    calls = []

    def train(plan, note):
        calls.append(memory)
        if len(calls) == 1:
            raise error
        return "trained"

    assert planned(train, plans(False, 1), lambda _: None, CPU) == "trained"
    assert calls == [ASKED, Plan(True)]


def test_what_a_cpu_really_says():
    def train(plan, note):
        if not memory.checkpointing:
            torch.empty(10**15)
        return "trained"

    assert planned(train, plans(False, 1), lambda _: None, CPU) == "trained"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("shapes do not match")])
def test_other_errors_get_through(error):
    def fails(plan, note):
        raise error

    with pytest.raises(type(error)):
        planned(fails, plans(False, 1), lambda _: None, CPU)


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


@pytest.mark.parametrize("method, settings", [
    (resteer, resteer.Settings(steps=3, batch=3)),
    (esd, esd.Settings(steps=3, sampling_steps=2, batch=3)),
    (ablation, ablation.Settings(steps=3, batch=3, samples=1, sample_steps=2, preserve=1.0)),
])  # fmt: skip
def test_prompts_that_go_apart_give_the_same_patch(monkeypatch, method, settings):
    """Memory for one prompt at a time only: the largest batch that the U-Net sees is 1."""
    model, sizes, steps = TinyModel(), [], []
    expected = method.run(model, [DOG], settings)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    forward = model.unet.mid_block.forward

    def seen(x, *args, **arguments):
        if torch.is_grad_enabled() and not isinstance(x, FakeTensor):
            sizes.append(len(x))
        return forward(x, *args, **arguments)

    model.unet.mid_block.forward = seen
    found = method.run(model, [DOG], settings, steps.append)
    assert set(sizes) == {1} and "prompts go one at a time" in steps[0].note
    assert found.info["loss"] == pytest.approx(expected.info["loss"], rel=1e-4)
    for name in expected.changes:
        torch.testing.assert_close(
            found.change_of(name), expected.change_of(name), rtol=1e-2, atol=1e-6
        )


def test_what_ablation_holds_for_the_prior_is_estimated(monkeypatch):
    monkeypatch.setattr(fit_adapters, "ESTIMATES", {})
    given = {"steps": 1, "batch": 1, "references": "samples", "samples": 1, "sample_steps": 2}
    for prior in (0.0, 1.0):
        ablation.run(TinyModel(), [DOG], ablation.Settings(**given, prior=prior))
    without, with_prior = (each.activations for each in fit_adapters.ESTIMATES.values())
    assert 1.8 * without < with_prior < 2.2 * without


def test_estimates_are_told_and_kept(monkeypatch):
    monkeypatch.setattr(fit_adapters, "ESTIMATES", {})
    steps = []
    resteer.run(TinyModel(), [DOG], resteer.Settings(steps=2), steps.append)
    (told,) = fit_adapters.ESTIMATES.values()
    assert [step.note for step in steps] == [str(told)] * 2
    assert steps[0].note.startswith("memory: weights 0.00 GB, activations")
    monkeypatch.setattr(fit_adapters, "estimate", None)  # it is not asked again
    resteer.run(TinyModel(), [DOG], resteer.Settings(steps=2), steps.append)
