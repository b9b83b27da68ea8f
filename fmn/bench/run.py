"""From cells to a report: what the command line and the node have in common."""

from pathlib import Path

from .runner import keep_patches, run_cells
from .store import Store
from .summary import summarise


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
    from .report import write_report

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
