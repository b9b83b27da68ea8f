"""Where tasks run: in this process, in processes of this machine, or on a Ray cluster.

A task is a function and its arguments. Workers get both pickled, so every machine needs this
package; results come back to this process, so none needs a shared folder.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple, Protocol, TypeVar

from ..errors import ForgetError, memory_ran_out

RETRIES = 5  # of a task whose machine or process went away
MOST_CHOSEN = 4  # workers of a machine whose number nobody gave
REMEDY = (
    "most likely for lack of memory: run the same command with fewer --workers. Finished work is "
    "kept."
)
Made = TypeVar("Made")


class Task(NamedTuple):
    """``key`` tells the caller which it was."""

    key: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Executor(Protocol):
    """Where tasks run."""

    slots: int  # tasks that run at the same time

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue a task. What this raises ends the run."""

    def close(self) -> None:
        """End at once whatever still runs."""


class Here:
    """Runs tasks in this process, one at a time. Memory that runs out ends the run: the program
    around it (ComfyUI) can then free some.

    Args:
        cancels: exceptions of a task that end the run instead of failing one task.
    """

    slots = 1

    def __init__(self, cancels: tuple[type[BaseException], ...] = ()):
        self.cancels = cancels

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except self.cancels:
            raise
        except Exception as error:  # a fault in one task must not cost the others' results
            if memory_ran_out(error):
                raise
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Runs tasks in ``slots`` processes of this machine, which share its cores."""

    def __init__(self, slots: int):
        self.slots = slots
        threads = max(1, _cores() // slots)
        self.pool = ProcessPoolExecutor(
            slots, get_context("spawn"), initializer=_start_process, initargs=(threads,)
        )

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        try:
            return self.pool.submit(function, *arguments)
        except BrokenProcessPool as error:  # others may have finished before that
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def close(self) -> None:
        is_cancelled = bool(self.pool._pending_work_items)  # nobody needs what still runs
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        if is_cancelled:
            for process in processes:
                process.kill()


class Cluster:
    """Runs tasks on the machines of a Ray cluster.

    Args:
        address: of the cluster's head, ``HOST:PORT``, or ``auto`` for the one this machine is in.
        workers: tasks at the same time on a machine, which share its cores and GPUs; 0: see
            ``open_executor``.
    """

    def __init__(self, address: str, workers: int = 0):
        try:
            import ray
        except ImportError as error:
            raise ForgetError(
                "--ray needs the package ray: install it with pip install 'ray>=2.50'."
            ) from error
        self.ray, before = ray, signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ForgetError(
                f"There is no Ray cluster at '{address}' ({error}): start one with ray start."
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # which Ray would answer by itself
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.slots, self.threads, gpus = share(machines, workers)
        # By default a process with a GPU ends after each task, and its model with it.
        wrap = ray.remote(num_cpus=self.threads, num_gpus=gpus, max_retries=RETRIES, max_calls=0)
        self.task = wrap(_with_threads)
        self.running: set[Any] = set()  # of ``ray.ObjectRef``

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        reference = self.task.remote(self.threads, function, *arguments)
        # Ray keeps a result, patch and all, as long as there is a reference.
        self.running.add(reference)

        def finish(done: Future[Any]) -> None:
            self.running.discard(reference)
            if error := done.exception():
                future.set_exception(self._plain(error))
            else:
                future.set_result(done.result())

        reference.future().add_done_callback(finish)
        return future

    def _plain(self, error: BaseException) -> BaseException:
        """The task's own error, or a message for one of Ray."""
        own = getattr(error, "cause", None)
        if own is None:
            own = ForgetError(f"A task was lost {RETRIES + 1} times with its worker, {REMEDY}")
        own.__cause__ = error
        return own

    def close(self) -> None:
        for reference in tuple(self.running):
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()


def share(machines: Sequence[Mapping[str, float]], workers: int) -> tuple[int, int, float]:
    """(tasks at the same time, a task's cores, its GPUs) of a cluster. Where some machines have a
    GPU, only those work.

    Args:
        machines: Ray's resources of each. workers: on each, or 0; see ``open_executor``.
    """
    able = [machine for machine in machines if machine.get("CPU", 0) >= 1]
    able = [machine for machine in able if machine.get("GPU")] or able
    if not able:
        raise ForgetError("The Ray cluster has no machine with cores: start one with ray start.")
    cores = int(min(machine["CPU"] for machine in able))
    workers = workers or min(MOST_CHOSEN, cores)
    threads = max(1, cores // workers)
    gpus = min(1.0, min(machine.get("GPU", 0) for machine in able) / workers)
    return sum(int(machine["CPU"]) // threads for machine in able), threads, gpus


def open_executor(workers: int, address: str | None = None) -> Executor:
    """``Cluster`` if there is an address, else ``Processes``, or ``Here`` for one worker.

    Args:
        workers: tasks at the same time on a machine; 0: one a core, at most ``MOST_CHOSEN``.
    """
    if not 0 <= workers <= 256:
        raise ForgetError(f"--workers is {workers}: use 1 to 256, or 0 to choose.")
    if address:
        return Cluster(address, workers)
    workers = workers or min(MOST_CHOSEN, _cores())
    return Here() if workers == 1 else Processes(workers)


def run_tasks(
    executor: Executor, next_task: Callable[[], Task | None]
) -> Iterator[tuple[Any, Future[Any]]]:
    """Run tasks as they become ready: yields the key and the finished future of each.

    Args:
        executor: the caller closes it.
        next_task: takes a task that is ready off the caller's list; None: there is none until
            another has finished.

    Raises:
        ForgetError: a worker process died. Tasks that were finished are yielded first.
    """
    running: dict[Future[Any], Any] = {}
    # Two more than there are slots, so that no worker waits for its next task.
    most = executor.slots + 2 * (executor.slots > 1)
    while True:
        while len(running) < most and (task := next_task()):
            running[executor.submit(task.function, *task.arguments)] = task.key
        if not running:
            return
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=_died):
            if _died(future):
                raise ForgetError(f"A worker process died, {REMEDY}") from future.exception()
            yield running.pop(future), future


def _died(future: Future[Any]) -> bool:
    return isinstance(future.exception(), BrokenProcessPool)


def kept(make: Callable[..., Made], *arguments: Any) -> Made:
    """What ``make`` returns for these arguments, such as a model, made once in this process and
    kept for its next task; only the last one, as it may be large."""
    key = make, repr(arguments)
    if key not in _kept:
        _kept.clear()
        _kept[key] = make(*arguments)
    return _kept[key]


_kept: dict[tuple[Callable[..., Any], str], Any] = {}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_process(threads: int) -> None:
    """Called once in each worker process of this machine; it lives no longer than its parent."""
    # Ctrl-C in a terminal reaches all processes; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _set_threads(threads)


def _exit_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _with_threads(threads: int, function: Callable[..., Made], *arguments: Any) -> Made:
    _set_threads(threads)
    return function(*arguments)


def _set_threads(threads: int) -> None:
    """Threads of several processes must not fight for the cores."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(threads)
