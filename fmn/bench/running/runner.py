"""Runs the cells that the store lacks; the executor decides in which processes."""

import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

from ...errors import ForgetError, memory_ran_out
from ..reporting.summary import Summary, summarise
from ..suite import Suite
from .cells import Cell, CellProgress, Method, Setup
from .lab import Lab, Outcome
from .store import Store
from .worker import start_process, work

OnCell = Callable[[CellProgress], object]


class Executor(Protocol):
    """Where cells are run."""

    slots: int  # cells that run at the same time

    def submit(self, setup: Setup, cell: Cell, patches: list[bytes]) -> Future[Outcome]:
        """Queue a cell with the patch files it needs. What this raises ends the run."""

    def close(self) -> None:
        """End at once whatever still runs."""


class Here:
    """Runs cells in this process, one at a time. Memory that runs out ends the run: the program
    around it (ComfyUI) can then free some.

    Args:
        cancels: exceptions of the lab's callback that end the run instead of failing one cell.
    """

    slots = 1

    def __init__(self, lab: Lab, cancels: tuple[type[BaseException], ...] = ()):
        self.lab, self.cancels = lab, cancels

    def submit(self, setup: Setup, cell: Cell, patches: list[bytes]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        try:
            future.set_result(self.lab.run(cell, patches))
        except self.cancels:
            raise
        except Exception as error:  # a fault in one measure must not cost the others' results
            if memory_ran_out(error):
                raise
            future.set_exception(error)
        return future

    def close(self) -> None:
        pass


class Processes:
    """Runs cells in ``slots`` processes of this machine, each with a copy of the model."""

    def __init__(self, slots: int, threads: int):
        self.slots = slots
        self.pool = ProcessPoolExecutor(
            slots, get_context("spawn"), initializer=start_process, initargs=(threads,)
        )

    def submit(self, setup: Setup, cell: Cell, patches: list[bytes]) -> Future[Outcome]:
        return self.pool.submit(work, setup, cell, patches)

    def close(self) -> None:
        is_cancelled = bool(self.pool._pending_work_items)  # nobody needs what still runs
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        if is_cancelled:
            for process in processes:
                process.kill()


def run_cells(
    setup: Setup,
    cells: Sequence[Cell],
    store: Store,
    executor: Executor,
    on_cell: OnCell = lambda progress: None,
) -> list[CellProgress]:
    """Run every cell that the store lacks, and keep each result as soon as it is there.

    Args:
        cells: in an order in which those that are needed come first.
        executor: the caller closes it.
        on_cell: may raise to cancel. Finished cells are kept.

    Returns:
        those that failed; cells that need their patches were left out.
    """
    todo = {cell.key(setup): cell for cell in cells}
    total = len(todo)
    todo = {key: cell for key, cell in todo.items() if key not in store}
    done = total - len(todo)
    running: dict[Future[Outcome], tuple[str, Cell]] = {}
    failed = []
    while todo or running:
        ready = [key for key, cell in todo.items() if all(need in store for need in cell.needs)]
        for key in ready:
            # Two more than there are slots, so that no process waits for its next cell.
            if len(running) >= executor.slots + 2 * (executor.slots > 1):
                break
            cell = todo.pop(key)
            patches = [store.patch(need) for need in cell.needs]
            running[executor.submit(setup, cell, patches)] = key, cell
        if not running:  # the rest needs patches of cells that failed
            break
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        # Those that were finished before a process died come first, and are kept.
        for future in sorted(finished, key=lambda f: isinstance(f.exception(), BrokenProcessPool)):
            key, cell = running.pop(future)
            try:
                result, patch, seconds = future.result()
            except BrokenProcessPool as error:
                raise ForgetError(
                    "A worker process died, most likely for lack of memory: run the same command "
                    "with fewer --workers. Finished cells are kept."
                ) from error
            except Exception as error:
                progress = CellProgress(done, total, cell, None, _message(error))
                failed.append(progress)
            else:
                store.add(key, asdict(cell), result, patch, seconds)
                done += 1
                progress = CellProgress(done, total, cell, seconds)
            on_cell(progress)
    return failed


def _message(error: Exception) -> str:
    cause = getattr(error, "cause", error)  # Ray wraps our own errors in one of its own
    if isinstance(cause, ForgetError):
        return str(cause)
    return memory_ran_out(error) or "".join(traceback.format_exception(error)).strip()


def store_patches(
    setup: Setup, cells: Sequence[Cell], store: Store, methods: Sequence[Method]
) -> None:
    """Put the patches of methods that are files into the store: their cells need no training."""
    known = {method.name: method for method in methods}
    for cell in cells:
        if cell.work == "train" and cell.key(setup) not in store:
            patch = known[cell.method].on(cell.targets[0]).patch
            if patch is not None:
                store.add(cell.key(setup), asdict(cell), {"bytes": len(patch)}, patch, 0.0)


def bench(
    setup: Setup,
    suite: Suite,
    cells: Sequence[Cell],
    methods: Sequence[Method],
    folder: str | os.PathLike[str],
    executor: Executor,
    on_cell: OnCell = lambda progress: None,
    command: str = "",
) -> tuple[Summary, dict[str, Path], list[CellProgress]]:
    """Run the cells that ``folder`` lacks, and write the report there.

    Args:
        cells: of ``cells.plan`` for these methods.
        folder: holds ``cells.sqlite``, and gets report.html, report.md, report.json and plots.
        executor: is closed at the end.
        command: printed in the report as the way to make it again.

    Returns:
        (summary, {name: path of a file of the report}, cells that failed).
    """
    from ..reporting.report import write_report

    folder = Path(folder)
    with Store(folder / "cells.sqlite") as store:
        try:
            store_patches(setup, cells, store, methods)
            failed = run_cells(setup, cells, store, executor, on_cell)
        finally:
            executor.close()
        summary = summarise(setup, suite, cells, store, command, failed)
    return summary, write_report(summary, folder), failed


def failures(failed: Sequence[CellProgress], paths: dict[str, Path]) -> str:
    """One message about all cells that failed."""
    first = failed[0]
    return (
        f"{len(failed)} of the bench's cells failed, the first being {first.cell.work} of "
        f"{first.cell.method} on {first.cell.targets[0]}:\n{first.error}\nAll others are kept and "
        f"in {paths['html']}; run the same again to try once more."
    )
