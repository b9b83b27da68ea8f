"""Cells as tasks of a Ray cluster. Every machine of it needs this package and the model's file."""

from concurrent.futures import Future
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
        self.running: set[Any] = set()  # of ``ray.ObjectRef``

    def submit(self, setup: Setup, cell: Cell, patches: list[bytes]) -> Future[Outcome]:
        reference = self.task.remote(self.threads, setup, cell, patches)
        self.running.add(reference)
        future = reference.future()
        # Ray keeps a result, patch and all, as long as there is a reference.
        future.add_done_callback(lambda _: self.running.discard(reference))
        return future

    def close(self) -> None:
        for reference in tuple(self.running):
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _work(threads: int, setup: Setup, cell: Cell, patches: list[bytes]) -> Outcome:
    set_threads(threads)
    return work(setup, cell, patches)
