"""Cells as tasks of a Ray cluster. Every machine of it needs this package and the model's file."""

from ..errors import ForgetError
from .running.worker import start_worker, work

RETRIES = 5  # of a task whose machine went away


class Cluster:
    """Does cells on the machines of a Ray cluster.

    Args:
        address: of the cluster's head, ``HOST:PORT``, or ``auto`` for the one this machine is in.
        threads: cores a task asks for, and threads it uses.
    """

    cancels = ()

    def __init__(self, address, threads=1):
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
        self.threads, self.keys = threads, {}

    def submit(self, key, setup, cell, patches):
        self.keys[self.task.remote(self.threads, setup, cell, patches)] = key

    def finished(self):
        """(key, function that gives the result or raises) of at least one cell."""
        done, _ = self.ray.wait(list(self.keys), num_returns=1)
        for reference in done:
            yield self.keys.pop(reference), lambda reference=reference: self._get(reference)

    def _get(self, reference):
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            # Ours, as it was raised there; Ray wraps it in one of its own.
            raise error.cause if isinstance(error.cause, ForgetError) else error from error

    def close(self):
        for reference in self.keys:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def _work(threads, setup, cell, patches):
    start_worker(threads)
    return work(setup, cell, patches)
