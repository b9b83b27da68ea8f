"""How much memory training needs, estimated before it starts, and how to make do with less."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ForgetError, memory_ran_out

log = logging.getLogger(__name__)
T = TypeVar("T")
GB = 1e9
COPIES = 4  # of trained parameters: gradient, AdamW's two moments, the last good step
# A CPU's allocator keeps freed blocks between those in use, and so holds more than is alive.
CPU_OVERHEAD = 2
SECONDS_BETWEEN_SAMPLES = 0.02


class Plan(NamedTuple):
    """How a step is computed; all plans give the same gradients, but for rounding."""

    checkpointing: bool  # activations inside of blocks are recomputed for gradients, not stored
    split_batch: bool = False  # the prompts of a step go one after the other, not as a batch

    def difference(self, other: "Plan") -> str:
        """What this plan does and the other does not, in words."""
        savings = {"checkpointing is on": self.checkpointing > other.checkpointing,
                   "prompts go one at a time": self.split_batch > other.split_batch}  # fmt: skip
        return " and ".join(words for words, new in savings.items() if new)


def plans(checkpointing: bool, batch: int) -> list[Plan]:
    """Plans for a batch of prompts, from the fastest to the one that needs the least memory."""
    split = batch > 1
    ordered = Plan(checkpointing), Plan(checkpointing, split), Plan(True, split)
    return list(dict.fromkeys(ordered))


class Activations(NamedTuple):
    """Bytes that a forward pass of one prompt stores for the backward pass."""

    stored: int
    checkpointed: int  # with the inputs of blocks, and the inside of the largest, alone


class Estimate(NamedTuple):
    """Bytes of memory that training takes."""

    weights: int  # of the U-Net; they are in memory before
    activations: int
    optimizer: int  # trained parameters, and what is kept of each

    @classmethod
    def of(
        cls,
        weights: int,
        trained: int,
        activations: Activations,
        plan: Plan,
        prompts: int = 1,
        forwards: int = 1,
    ) -> "Estimate":
        """Of bytes of parameters, prompts a step, and forward passes whose activations a step
        holds at once."""
        stored = activations.checkpointed if plan.checkpointing else activations.stored
        stored *= forwards * (1 if plan.split_batch else prompts)
        return cls(weights, stored, (1 + COPIES) * trained)

    def fits(self, free: int | None, device: torch.device) -> bool:
        needed = self.activations * (CPU_OVERHEAD if device.type == "cpu" else 1) + self.optimizer
        return free is None or needed <= free

    def __str__(self) -> str:
        parts = zip(self._fields, self)
        return "memory: " + ", ".join(f"{name} {size / GB:.2f} GB" for name, size in parts)


def measure_activations(
    forward: Callable[[], object],
    blocks: Sequence[torch.nn.Module],
    weights: Iterable[torch.Tensor] = (),
) -> Activations:
    """Run a forward pass, and count what it would store for a backward pass without storing it.

    Args:
        forward: runs with gradients, and without checkpointing.
        blocks: modules that checkpointing would recompute; not nested.
        weights: are in memory anyway, and not counted.
    """
    seen = WeakSet(weight.untyped_storage() for weight in weights)
    stored = inputs = inside = largest = start = 0

    def count(tensor: torch.Tensor) -> None:
        nonlocal stored
        storage = tensor.untyped_storage()
        if storage not in seen:
            seen.add(storage)
            stored += storage.nbytes()

    def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal start, inputs
        start = stored
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        inputs += sum(tensor.nbytes for tensor in tensors)

    def leave(module: torch.nn.Module, args: object, output: object) -> None:
        nonlocal inside, largest
        inside, largest = inside + stored - start, max(largest, stored - start)

    with ExitStack() as hooks, torch.enable_grad():
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(leave))
        hooks.enter_context(saved_tensors_hooks(count, lambda nothing: nothing))
        forward()
    return Activations(stored, stored - inside + inputs + largest)


def train_with_retry(
    train: Callable[[Plan, str], T],
    ordered: Sequence[Plan],
    estimate_of: Callable[[Plan], Estimate] | None,
    device: torch.device,
) -> T:
    """Train with the first plan that fits the free memory; if memory runs out, once more.

    The second try is with the last plan. What is done to fit is logged, and with the estimate it
    is the message that ``train`` gets.

    Args:
        train: function from a plan and a message.
        ordered: of ``plans``.
        estimate_of: None if nothing is known; the first plan is tried then.

    Raises:
        ForgetError: memory ran out, with the last plan too.
    """
    plan, message, cheapest = ordered[0], "", ordered[-1]
    if estimate_of is not None:
        free = free_memory(device)
        plan = next((p for p in ordered if estimate_of(p).fits(free, device)), cheapest)
        message = str(estimate_of(plan))
        if plan != ordered[0]:
            message += f"; {plan.difference(ordered[0])}, as {(free or 0) / GB:.1f} GB are free"
        log.info(message)
    result = _unless_out_of_memory(train, plan, message)
    if result is None and plan != cheapest:
        what = f"memory ran out, so training began anew: {cheapest.difference(plan)}"
        message = f"{message}; {what}".removeprefix("; ")
        log.warning(message)
        result = _unless_out_of_memory(train, cheapest, message)
    if result is None:
        raise ForgetError(
            "Memory ran out while training, even with checkpointing and one prompt at a time: "
            "choose a smaller size, or fewer layers."
        )
    return result


def _unless_out_of_memory(train: Callable[[Plan, str], T], plan: Plan, message: str) -> T | None:
    # A function of its own, so that the frames that the error holds are freed afterwards.
    try:
        return train(plan, message)
    except (RuntimeError, MemoryError) as error:
        if memory_ran_out(error) is None:
            raise
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device can still give, or None where nothing says so."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else None


def process_memory() -> int:
    """Bytes of this process that are in memory."""
    return psutil.Process().memory_info().rss


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the peak in bytes since the start; call it before the end.

    On a GPU, of what torch allocated there; else of the memory of the process, sampled in a thread.
    """
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() - before
        return
    before = peak = process_memory()
    finished = threading.Event()

    def sample() -> int:
        nonlocal peak
        peak = max(peak, process_memory())
        return peak - before

    def keep_sampling() -> None:
        while not finished.wait(SECONDS_BETWEEN_SAMPLES):
            sample()

    thread = threading.Thread(target=keep_sampling, daemon=True)
    thread.start()
    try:
        yield sample
    finally:
        finished.set()
        thread.join()
