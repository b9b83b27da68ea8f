"""A summary as files: a page for people, Markdown for a README, JSON for programs, plots."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ...errors import ForgetError
from ...files import write_whole
from ...text import printable
from .columns import GROUPS, Column
from .html import page
from .summary import Summary, Values
from .tables import (
    Body,
    Cell,
    bodies_of_means,
    bodies_of_targets,
    columns_of,
    facts,
    lead,
    overall_means,
    to_cell,
)

COMPACT = "UA", "IRA", "CRA", "HM", "paired"
NO_PLOTS = (
    'There are no plots because matplotlib is not installed: run "pip install matplotlib", then '
    "the bench again."
)
log = logging.getLogger(__name__)


def write_report(summary: Summary, folder: str | Path) -> dict[str, Path]:
    """Write report.html, report.md, report.json and the plots.

    Args:
        folder: made if missing; files of the same names are replaced.

    Returns:
        Name -> path: "html", "md", "json" and one a plot. Without matplotlib there are no plots,
        and the report says so.

    Raises:
        ForgetError: nothing was measured, or the folder cannot be written to.
    """
    if not summary["rows"]:
        raise ForgetError(
            "Nothing was measured, so there is nothing to report: run the bench on a target."
        )
    folder, figures = Path(folder), []
    if missing := missing_plots():
        log.warning(missing)
        summary = summary | {"notes": [*summary["notes"], missing]}
    else:
        from .plots import plots  # loads matplotlib

        figures = [(plot, plot.png()) for plot in plots(summary)]
    files = {
        "html": ("report.html", page(summary, figures).encode()),
        "md": ("report.md", markdown(summary).encode()),
        "json": ("report.json", _json(summary).encode()),
    }
    files |= {plot.name: (f"{plot.name}.png", png) for plot, png in figures}
    for name, data in files.values():
        write_whole(folder / name, partial(Path.write_bytes, data=data))
    return {key: folder / name for key, (name, _) in files.items()}


def missing_plots() -> str:
    """Why a report written here has no plots, a sentence; empty if it has."""
    return "" if find_spec("matplotlib") else NO_PLOTS


def markdown_table(summary: Summary, columns: Sequence[Column] = ()) -> str:
    """Means over targets as a Markdown table: a row a method and kind, intervals in brackets.

    Args:
        columns: those of ``compact_columns`` unless given.
    """
    columns = columns or compact_columns(summary)
    bodies = bodies_of_means(summary, columns)
    if len(bodies) < 2:
        bodies = [Body((), body.rows) for body in bodies]
    return _table(["targets"] if len(bodies) > 1 else [], bodies, columns)


def target_table(summary: Summary) -> str:
    """A Markdown table with a row a target and method."""
    columns = compact_columns(summary)
    return _table(["target", "kind"], bodies_of_targets(summary, columns), columns)


def in_short(summary: Summary) -> str:
    """A line a method with the compact table's columns, means over all targets, no intervals."""
    columns = compact_columns(summary)
    return "\n".join(
        printable(f"{mean['method']}: {', '.join(_short(mean['values'], c) for c in columns)}")
        for mean in overall_means(summary)
    )


def markdown(summary: Summary) -> str:
    """The whole report as Markdown."""
    parts = [f"# ConceptBench: {_escaped(summary['suite'])}", lead(summary)]
    parts.append(_list(f"{name}: {_escaped(text)}" for name, text in facts(summary)))
    for group, (heading, _) in GROUPS.items():
        if columns := columns_of(summary, group):
            shown = () if group == "main" else columns
            parts += [f"## {heading}", markdown_table(summary, shown)]
    parts += ["## Each target", target_table(summary), "## Columns"]
    parts.append(
        _list(f"**{_escaped(c['title'])}**: {_escaped(c['what'])}" for c in summary["columns"])
    )
    if summary["notes"]:
        parts += ["## Notes", _list(_escaped(note) for note in summary["notes"])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def compact_columns(summary: Summary) -> list[Column]:
    """UA, IRA, CRA and their harmonic mean, or without those all main columns, or without any all
    columns."""
    main = columns_of(summary, "main")
    return [column for column in main if column["key"] in COMPACT] or main or summary["columns"]


def _table(names: Sequence[str], bodies: Sequence[Body], columns: Sequence[Column]) -> str:
    """``names`` are the heads of a body's own cells, repeated in every row."""
    units = [f" ({_escaped(c['unit'])})" if c["unit"] else "" for c in columns]
    titles = [_escaped(c["title"]) + unit for c, unit in zip(columns, units)]
    lines = [[*names, "method", *titles], ["---"] * (len(names) + 1) + ["---:"] * len(columns)]
    for body in bodies:
        for method, cells in body.rows:
            first = [_escaped(text) for text in (*body.heading, method)]
            lines.append(first + [_cell(cell) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Cell) -> str:
    if not cell.number:
        return "not measured"
    text = f"**{cell.number}**" if cell.is_best else cell.number
    return f"{text} ({cell.interval})" if cell.interval else text


def _short(values: Values, column: Column) -> str:
    text = to_cell(values.get(column["key"]), column["unit"]).number
    if not text:
        return f"{column['title']} not measured"
    return f"{column['title']} {text} {column['unit']}".rstrip()


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _escaped(text: str) -> str:
    """Untrusted text that Markdown shows as it is."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|!#~>])", r"\\\1", text)


def _json(summary: Summary) -> str:
    """The summary without pictures, keys in order."""
    grids = [
        {**grid, "rows": [{"label": row["label"]} for row in grid["rows"]]}
        for grid in summary["grids"]
    ]
    text = json.dumps({**summary, "grids": grids}, sort_keys=True, indent=1, allow_nan=False)
    return text + "\n"
