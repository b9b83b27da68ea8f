"""Runs the cells that the store lacks; the executor decides in which processes."""

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ...errors import ForgetError, memory_ran_out
from ...jobs.executors import Executor, Task, run_tasks
from ..reporting.summary import Summary, summarise
from ..suite import Suite
from .cells import Cell, CellProgress, Method, Setup
from .lab import Lab, work
from .store import Store

OnCell = Callable[[CellProgress], object]


def run_cells(
    setup: Setup,
    cells: Sequence[Cell],
    store: Store,
    executor: Executor,
    on_cell: OnCell = lambda progress: None,
    lab: Lab | None = None,
) -> list[CellProgress]:
    """Run every cell that the store lacks, and keep each result as soon as it is there.

    Args:
        cells: in an order in which those that are needed come first.
        executor: the caller closes it.
        on_cell: may raise to cancel. Finished cells are kept.
        lab: for an executor in this process; None: each process makes its own.

    Returns:
        those that failed; cells that need their patches were left out.
    """
    todo = {cell.key(setup): cell for cell in cells}
    total = len(todo)
    todo = {key: cell for key, cell in todo.items() if key not in store}
    done = total - len(todo)
    failed = []
    run = lab.run if lab else partial(work, setup)

    def next_task() -> Task | None:
        for key, cell in todo.items():
            if all(need in store for need in cell.needs):
                del todo[key]
                return Task((key, cell), run, (cell, [store.patch(need) for need in cell.needs]))
        return None  # what is left needs patches that are not there yet, or of cells that failed

    for (key, cell), future in run_tasks(executor, next_task):
        if error := future.exception():
            progress = CellProgress(done, total, cell, None, _message(error))
            failed.append(progress)
        else:
            result, patch, seconds = future.result()
            store.add(key, asdict(cell), result, patch, seconds)
            done += 1
            progress = CellProgress(done, total, cell, seconds)
        on_cell(progress)
    return failed


def _message(error: BaseException) -> str:
    if isinstance(error, ForgetError):
        return str(error)
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
    lab: Lab | None = None,
) -> tuple[Summary, dict[str, Path], list[CellProgress]]:
    """Run the cells that ``folder`` lacks, and write the report there.

    Args:
        cells: of ``cells.plan`` for these methods.
        folder: holds ``cells.sqlite``, and gets report.html, report.md, report.json and plots.
        executor: is closed at the end.
        command: printed in the report as the way to make it again.
        lab: see ``run_cells``.

    Returns:
        (summary, {name: path of a file of the report}, cells that failed).
    """
    from ..reporting.report import write_report

    folder = Path(folder)
    with Store(folder / "cells.sqlite") as store:
        try:
            store_patches(setup, cells, store, methods)
            failed = run_cells(setup, cells, store, executor, on_cell, lab)
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
