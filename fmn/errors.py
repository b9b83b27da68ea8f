"""Errors that a user can act on. Each message is one sentence: what is wrong, what was expected,
what to do."""

import re
from collections.abc import Sequence
from typing import Any

# The plain RuntimeErrors of torch on GPUs, on CPUs (Linux and Windows), and of cuBLAS.
OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate|not enough memory|alloc_failed", re.IGNORECASE
)


LONG = re.compile(r"'[^'\n]{120,}'|\S{120,}")  # names that a file gave, which may have any length


class ForgetError(Exception):
    """Unusable input or an unusable model; the message says what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(LONG.sub(lambda name: f"{name[0][:60]}...{name[0][-30:]}", message))


class NonFiniteLoss(ForgetError):
    """Training diverged. The parameters hold the last state whose loss was finite.

    Attributes:
        losses: the finite losses so far, one a step.
        patch: the ``ForgetPatch`` of the last good state; None if no step was finished.
    """

    def __init__(self, message: str, losses: Sequence[float] = ()) -> None:  # none: unpickled
        super().__init__(message)
        self.losses = losses
        self.patch: Any = None  # its class lies in a package above this one


def memory_ran_out(error: BaseException) -> str | None:
    """The message for an out-of-memory error; None for any other error.

    torch's OutOfMemoryError is recognised by its name, so that nothing imports torch for this.
    """
    text = str(error)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and not (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(text)):
        return None
    size = re.search(r"ried to allocate [\d.]+ \w+", text)
    detail = f" (t{size[0]})" if size else ""
    if "CUDA" not in text:
        return f"Memory ran out{detail}: close other programs, or choose a smaller size."
    return (
        f"The GPU's memory ran out{detail}: close other programs that use it, choose a smaller "
        "size, or set CUDA_VISIBLE_DEVICES=-1 in the environment to run on the CPU."
    )
