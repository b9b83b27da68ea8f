"""Cells as tasks of a Ray cluster. Every machine of it needs this package and the model's file."""

from collections.abc import Iterable
from typing import Any

from ..errors import ForgetError
from .running.cells import Cell, Setup
from .running.lab import Outcome
from .running.worker import set_threads, work

RETRIES = 5  # of a task whose machine went away


class Cluster:
    """Runs cells on the machines of a Ray cluster; a ``runner.Executor``.

    Args:
        address: of the cluster's head, ``HOST:PORT``, or ``auto`` for the one this machine is in.
        threads: cores a task asks for, and threads it uses.
    """

    def __init__(self, address: str, threads: int = 1):
        try:
            import ray
        except ImportError as error:
            raise ForgetError(
                "--ray needs the package ray: install it with pip install 'ray>=2.50'."
            ) from error
        self.ray = ray
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ForgetError(
                f"There is no Ray cluster at '{address}' ({error}): start one with ray start."
            ) from error
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        self.task = ray.remote(num_cpus=threads, max_retries=RETRIES)(_work)
        self.threads = threads
        self.keys: dict[Any, str] = {}  # by ``ray.ObjectRef``

    def submit(self, key: str, setup: Setup, cell: Cell, patches: list[bytes]) -> None:
        self.keys[self.task.remote(self.threads, setup, cell, patches)] = key

    def finished(self) -> Iterable[tuple[str, Outcome | Exception]]:
        done, _ = self.ray.wait(list(self.keys), num_returns=1)
        for reference in done:
            yield self.keys.pop(reference), self._outcome(reference)

    def _outcome(self, reference: Any) -> Outcome | Exception:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            # Ray wraps our own errors in one of its own.
            cause = getattr(error, "cause", None)
            return cause if isinstance(cause, ForgetError) else error

    def close(self) -> None:
        for reference in self.keys:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _work(threads: int, setup: Setup, cell: Cell, patches: list[bytes]) -> Outcome:
    set_threads(threads)
    return work(setup, cell, patches)
