"""Errors that a user can act on. Every message is one sentence: what is wrong, what was
expected, what to do."""

import re

# How torch says it in a plain RuntimeError: GPUs, CPUs on Linux and on Windows, and cuBLAS.
RAN_OUT = re.compile("out of memory|can't allocate|not enough memory|alloc_failed", re.IGNORECASE)


class ForgetError(Exception):
    """Input or a model that cannot be worked with; the message says what to change."""


class NonFiniteLoss(ForgetError):
    """Training blew up. The parameters hold the last state whose loss was finite.

    Attributes:
        losses: the finite losses so far, one a step.
        patch: the patch made from the last good state; None if no step was finished.
    """

    def __init__(self, message, losses):
        super().__init__(message)
        self.losses = losses
        self.patch = None


def memory_ran_out(error):
    """What to tell of an error if it came for want of memory, else None.

    torch's own error is known by its name, for torch is not to be imported for this.
    """
    text = str(error)
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and not (isinstance(error, RuntimeError) and RAN_OUT.search(text)):
        return None
    size = re.search(r"ried to allocate [\d.]+ \w+", text)
    told = f" (t{size[0]})" if size else ""
    if "CUDA" not in text:
        return f"Memory ran out{told}: close other programs, or choose a smaller size."
    return (
        f"The GPU's memory ran out{told}: close what else uses it, choose a smaller size, or set "
        "CUDA_VISIBLE_DEVICES=-1 in the environment, which leaves the work to the CPU."
    )
