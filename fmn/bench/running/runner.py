"""Does the cells that are not done yet, wherever an executor does them; one writer of the store."""

import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from ...errors import ForgetError
from ..reporting.summary import summarise
from .store import Store
from .worker import start_worker, work


@dataclass(frozen=True)
class Progress:
    """What the callback gets after each cell."""

    done: int  # of this run and earlier ones
    total: int
    cell: object
    seconds: float | None  # None: it failed
    error: str = ""


class Here:
    """Does cells in this process, one at a time.

    Args:
        lab: a ``lab.Lab``.
        cancels: exceptions of its callback that end the run instead of failing one cell.
    """

    slots = 1

    def __init__(self, lab, cancels=()):
        self.lab, self.cancels, self.waiting = lab, cancels, []

    def submit(self, key, setup, cell, patches):
        self.waiting.append((key, cell, patches))

    def finished(self):
        """(key, function that gives the result or raises) of at least one cell."""
        key, cell, patches = self.waiting.pop(0)
        yield key, lambda: self.lab.run(cell, patches)

    def close(self):
        self.waiting.clear()


class Processes:
    """Does cells in processes of this machine, each with its own copy of the model."""

    cancels = ()

    def __init__(self, workers, threads):
        self.slots = workers
        self.pool = ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=start_worker, initargs=(threads,)
        )
        self.keys = {}

    def submit(self, key, setup, cell, patches):
        self.keys[self.pool.submit(work, setup, cell, patches)] = key

    def finished(self):
        done, _ = wait(self.keys, return_when=FIRST_COMPLETED)
        for future in done:
            yield self.keys.pop(future), future.result

    def close(self):
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.keys:  # cancelled: what runs is of no use any more
            for process in processes:
                process.terminate()


def run_cells(setup, cells, store, executor, on_progress=lambda progress: None):
    """Do every cell that the store lacks, and keep each result as soon as it is there.

    Args:
        cells: in an order in which those that are needed come first.
        executor: ``Here``, ``Processes`` or ``ray_cluster.Cluster``; the caller closes it.
        on_progress: gets a ``Progress``; may raise to cancel. Finished cells are kept.

    Returns:
        list of ``Progress`` of cells that failed; those that needed them were left out.
    """
    todo = {cell.key(setup): cell for cell in cells}
    total = len(todo)
    todo = {key: cell for key, cell in todo.items() if key not in store}
    running, failed, broken = {}, [], set()
    done = total - len(todo)
    while todo or running:
        for key in _ready(todo, store, broken):
            # Two more than there are hands, so that none waits for its next cell.
            if len(running) >= executor.slots + 2 * (executor.slots > 1):
                break
            running[key] = cell = todo.pop(key)
            executor.submit(key, setup, cell, [store.patch(need) for need in cell.needs])
        if not running:  # all that is left needs what failed
            break
        for key, outcome in executor.finished():
            cell, error, seconds = running.pop(key), "", None
            try:
                result, patch, seconds = outcome()
            except BrokenProcessPool as gone:
                raise ForgetError(
                    "A worker process died, most likely for lack of memory: run the same "
                    "command with fewer --workers. Finished cells are kept."
                ) from gone
            except executor.cancels:
                raise
            except Exception as caught:
                broken.add(key)
                error = _told(caught)
            else:
                store.add(key, asdict(cell), result, patch, seconds)
                done += 1
            progress = Progress(done, total, cell, seconds, error)
            if error:
                failed.append(progress)
            on_progress(progress)
    return failed


def _told(error):
    if isinstance(error, ForgetError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()


def _ready(todo, store, broken):
    """Keys whose patches are there; drops those that need a cell that failed."""
    for key in list(todo):
        if any(need in broken for need in todo[key].needs):
            broken.add(key)
            del todo[key]
    return [key for key, cell in todo.items() if all(need in store for need in cell.needs)]


def keep_patches(setup, cells, store, methods):
    """Take the patches that methods came with into the store: their cells need no work."""
    patches = {method.name: method.patch for method in methods if method.patch is not None}
    for cell in cells:
        if cell.work == "train" and cell.method in patches and cell.key(setup) not in store:
            data = patches[cell.method]
            store.add(cell.key(setup), asdict(cell), {"bytes": len(data)}, data, 0.0)


pass


def bench(
    setup, suite, cells, methods, folder, executor, on_progress=lambda progress: None, command=""
):
    """Do the cells that ``folder`` lacks, and write the report there.

    Args:
        cells: of ``cells.plan`` for these methods.
        folder: holds ``cells.sqlite``, and gets report.html, report.md, report.json and plots.
        command: what to print as the way to make it again.

    Returns:
        (summary, {name: path of a file of the report}, list of ``runner.Progress`` that failed).
    """
    from ..reporting.report import write_report

    folder = Path(folder)
    with Store(folder / "cells.sqlite") as store:
        try:
            keep_patches(setup, cells, store, methods)
            failed = run_cells(setup, cells, store, executor, on_progress)
        finally:
            executor.close()
        summary = summarise(setup, suite, cells, store, command, failed)
    return summary, write_report(summary, folder), failed


def failures(failed, paths):
    """One text on what went wrong."""
    first = failed[0]
    return (
        f"{len(failed)} of the bench's cells failed, the first being {first.cell.work} of "
        f"{first.cell.method} on {first.cell.targets[0]}:\n{first.error}\nAll others are kept and "
        f"in {paths['html']}; run the same again to try once more."
    )
