"""The memory that training needs, and what happens where there is not enough."""

import logging
import mmap

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.methods import ablation, esd, resteer
from fmn.training import fit_adapters, memory
from fmn.training.memory import (
    Activations,
    Estimate,
    Plan,
    measure_activations,
    peak_memory,
    plans,
    train_with_retry,
)

from ..tiny import TinyModel, same_tensors, weights_of

CPU = torch.device("cpu")
DOG = Concept("dog")


class Block(torch.nn.Module):
    """Stores its input and two more tensors of the same size."""

    def forward(self, x):
        return x.sin().sin().sin()


def test_activations_are_counted_once_and_not_stored():
    start, weight = torch.randn(10, 100), torch.nn.Parameter(torch.ones(100))  # 4,000 bytes
    blocks = [Block(), Block()]

    def forward():
        x = start * weight  # stores ``start``; the weight is no activation
        for block in blocks:
            x = block(x)
        y = (x * x).view(-1)  # stores x once
        return y.square()  # stores y

    # start, three of each block, the last x, y; blocks keep their input and recompute one inside
    expected = Activations(4000 * (1 + 3 + 3 + 1 + 1), 4000 * (1 + 1 + 1 + 2 + 3))
    assert measure_activations(forward, blocks, [weight]) == expected
    assert measure_activations(forward, [], [weight]).checkpointed == expected.stored
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("size", [64, 256])
def test_activations_of_a_u_net_are_what_autograd_stores(size):
    """Compared with the storages that live until the backward pass."""
    model, x = TinyModel(), torch.randn(1, 4, size // 8, size // 8)
    text, t = model.encode(DOG.training_prompts()[0]), torch.tensor([500])
    with model.borrow_denoiser() as denoiser:
        x.requires_grad_()

        def forward():
            return denoiser.predict_noise(x, t, text)

        kept, parameters = {}, {p.data_ptr() for p in model.unet.parameters()}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
        blocks = denoiser.checkpoint_blocks()
        measured = measure_activations(forward, blocks, model.unet.parameters())
    sizes = [t.untyped_storage().nbytes() for p, t in kept.items() if p not in parameters]
    assert measured.stored == pytest.approx(sum(sizes), rel=0.02)
    assert 0 < measured.checkpointed < measured.stored


def test_an_estimate_has_the_activations_of_its_plan_and_the_optimizer_s_copies():
    given = 10_000, 1000, Activations(600, 200)
    plain = Estimate.of(*given, Plan(False), prompts=3, forwards=2)
    split = Estimate.of(*given, Plan(True, split_batch=True), prompts=3)
    assert plain == (10_000, 3 * 2 * 600, 5 * 1000) and split == (10_000, 200, 5 * 1000)


def test_an_estimate_leaves_room_for_a_cpu_s_allocator():
    needed = Estimate(10**9, 100, 10)
    assert needed.fits(110, torch.device("cuda")) and not needed.fits(109, torch.device("cuda"))
    assert needed.fits(210, CPU) and not needed.fits(209, CPU) and needed.fits(None, CPU)


def train_that(fails=()):
    """A stand-in for training, and the arguments it gets; memory runs out in some calls."""
    calls = []

    def train(plan, message):
        calls.append((plan, message))
        if len(calls) in fails:
            raise torch.OutOfMemoryError
        return "trained"

    return train, calls


def needs(plan):
    size = 2 * 10**9 // (2 if plan.split_batch else 1) // (2 if plan.checkpointing else 1)
    return Estimate(10**9, size, 10**6)


ASKED, SPLIT, LEAST = Plan(False), Plan(False, split_batch=True), Plan(True, split_batch=True)


def test_plans_from_fast_to_little_memory():
    assert plans(False, 1) == [ASKED, Plan(True)] and plans(True, 1) == [Plan(True)]
    assert plans(False, 4) == [ASKED, SPLIT, LEAST]
    assert plans(True, 4) == [Plan(True), LEAST]


@pytest.mark.parametrize("free, ordered, used, message", [
    (5e9, plans(False, 4), ASKED, None),
    (4e9, plans(False, 4), SPLIT, "prompts go one at a time, as 4.0 GB are free"),
    (2e9, plans(False, 4), LEAST, "checkpointing is on and prompts go one at a time, as 2.0"),
    (1e8, plans(False, 4), LEAST, "as 0.1 GB are free"),  # one can but try
    (4e9, plans(False, 1), Plan(True), "checkpointing is on, as 4.0 GB are free"),
    (1e8, plans(True, 1), Plan(True), None),
    (None, plans(False, 4), ASKED, None),
])  # fmt: skip
def test_the_plan_fits_the_free_memory(monkeypatch, free, ordered, used, message):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    train, calls = train_that()
    assert train_with_retry(train, ordered, needs, CPU) == "trained"
    [(plan, given)] = calls
    assert plan == used and given.startswith(str(needs(used)))
    assert message in given if message else given == str(needs(used))


def test_training_begins_anew_if_memory_runs_out(caplog):
    train, calls = train_that(fails=[1])
    with caplog.at_level(logging.WARNING):
        assert train_with_retry(train, plans(False, 1), None, CPU) == "trained"
    assert [plan for plan, _ in calls] == [ASKED, Plan(True)]
    message = "memory ran out, so training began anew: checkpointing is on"
    assert calls[1][1] == message and caplog.messages == [message]


@pytest.mark.parametrize("batch, asked, fails", [
    (1, True, [1]), (1, False, [1, 2]), (4, False, [1, 2]),
])  # fmt: skip
def test_it_begins_anew_once_with_the_last_plan(batch, asked, fails):
    train, calls = train_that(fails)
    with pytest.raises(ForgetError, match="Memory ran out.*choose a smaller size"):
        train_with_retry(train, plans(asked, batch), None, CPU)
    assert len(calls) == len(fails) and calls[-1][0] == Plan(True, batch > 1)


MESSAGES = {
    "MPS": "MPS backend out of memory (MPS allocated: 9.06 GB, max allowed: 9.07 GB).",
    "Linux": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
    "memory: you tried to allocate 4000000000000000 bytes.",
    "Windows": "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: "
    "you tried to allocate 4194304 bytes.",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
}


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, MESSAGES.values())])
def test_all_back_ends_messages_are_known(error):
    calls = []

    def train(plan, message):
        calls.append(plan)
        if len(calls) == 1:
            raise error
        return "trained"

    assert train_with_retry(train, plans(False, 1), None, CPU) == "trained"
    assert calls == [ASKED, Plan(True)]


def test_the_message_of_a_real_cpu_is_known():
    def train(plan, message):
        if not plan.checkpointing:
            torch.empty(10**15)
        return "trained"

    assert train_with_retry(train, plans(False, 1), None, CPU) == "trained"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("shapes do not match")])
def test_other_errors_get_through(error):
    def fails(plan, message):
        raise error

    with pytest.raises(type(error)):
        train_with_retry(fails, plans(False, 1), None, CPU)


@pytest.fixture
def no_estimate(monkeypatch):
    monkeypatch.setattr(fit_adapters, "measure_activations", lambda *given: Activations(0, 0))


@pytest.mark.parametrize("method, settings", [
    (resteer, resteer.Settings(steps=3)),
    (esd, esd.Settings(steps=3, sampling_steps=2)),
])  # fmt: skip
def test_a_method_whose_memory_runs_out(no_estimate, method, settings):
    """A stand-in for a GPU: the second forward in training raises. The patch is the same."""
    steps, model = [], TinyModel()
    before = weights_of(model.unet)
    expected = method.run(model, [DOG], settings)
    forward, calls = model.unet.mid_block.forward, []

    def runs_out(*args, **arguments):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError
        return forward(*args, **arguments)

    model.unet.mid_block.forward = runs_out
    patch = method.run(model, [DOG], settings, steps.append)
    assert [step.index for step in steps] == [1, 1, 2, 3]
    assert "ran out" not in steps[0].memory and "began anew" in steps[1].memory
    for name in expected.changes:
        torch.testing.assert_close(patch.change_of(name), expected.change_of(name))
    assert same_tensors(weights_of(model.unet), before)


@pytest.mark.parametrize("method, settings", [
    (resteer, resteer.Settings(steps=3, batch=3)),
    (esd, esd.Settings(steps=3, sampling_steps=2, batch=3)),
    (ablation, ablation.Settings(steps=3, batch=3, samples=1, sample_steps=2, preserve=1.0)),
])  # fmt: skip
def test_a_split_batch_gives_the_same_patch(monkeypatch, no_estimate, method, settings):
    """Memory for one prompt at a time only: the largest batch that the U-Net gets is 1."""
    model, sizes, steps = TinyModel(), [], []
    expected = method.run(model, [DOG], settings)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    forward = model.unet.mid_block.forward

    def watched(x, *args, **arguments):
        if torch.is_grad_enabled():
            sizes.append(len(x))
        return forward(x, *args, **arguments)

    model.unet.mid_block.forward = watched
    patch = method.run(model, [DOG], settings, steps.append)
    assert set(sizes) == {1} and "prompts go one at a time" in steps[0].memory
    assert patch.info["loss"] == pytest.approx(expected.info["loss"], rel=1e-4)
    for name in expected.changes:
        torch.testing.assert_close(
            patch.change_of(name), expected.change_of(name), rtol=1e-2, atol=1e-6
        )


def test_the_prior_of_ablation_doubles_the_estimate(monkeypatch):
    estimates, make = [], Estimate.of

    def recorded(*args, **options):
        estimates.append(make(*args, **options))
        return estimates[-1]

    monkeypatch.setattr(Estimate, "of", recorded)
    given = {"steps": 1, "batch": 1, "references": "samples", "samples": 1, "sample_steps": 2}
    for prior in (0.0, 1.0):
        ablation.run(TinyModel(), [DOG], ablation.Settings(**given, prior=prior))
    assert estimates[-1].activations == 2 * estimates[0].activations > 0


def test_progress_has_the_estimate():
    steps = []
    resteer.run(TinyModel(), [DOG], resteer.Settings(steps=2), steps.append)
    assert steps[0].memory.startswith("memory: weights 0.00 GB, activations")
    assert len({step.memory for step in steps}) == 1


def test_the_peak_of_a_process_is_measured():
    with peak_memory() as peak, mmap.mmap(-1, 200_000_000) as block:  # none that was freed before
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        high = peak()
        assert 195e6 < high < 260e6 and peak() >= high
