"""A summary as files: a page for people, Markdown for a README, JSON for programs, plots."""

import io
import json
import math
import re
from pathlib import Path

from ...errors import ForgetError
from ...files import write_whole
from ...text import printable
from .html import GROUPS, page, picture
from .plots import plots
from .sheet import is_measured
from .wording import best_rows, columns_of, facts, interval, kinds_first, lead, number

COMPACT = "UA", "IRA", "CRA", "HM"
TEXTS = "suite", "judge", "made", "command"
FIELDS = {
    "model": dict, "sampling": dict, "notes": list, "columns": list,
    "rows": list, "means": list, "grids": list,
}  # fmt: skip


def write_report(summary, folder):
    """Write report.html, report.md, report.json and the plots.

    Args:
        summary: of a bench, JSON-able. folder: made if missing; files of the same names there
            are replaced.

    Returns:
        Name -> path: "html", "md", "json" and one a plot.

    Raises:
        ForgetError: nothing was measured, the summary is not as described, a value is not
            finite, or the folder cannot be written to.
    """
    check(summary)
    folder = Path(folder)
    figures = [(plot, _png(plot.image)) for plot in plots(summary)]
    files = {
        "html": ("report.html", page(summary, figures).encode()),
        "md": ("report.md", markdown(summary).encode()),
        "json": ("report.json", _json(summary).encode()),
    }
    files |= {plot.name: (f"{plot.name}.png", png) for plot, png in figures}
    for name, data in files.values():
        write_whole(folder / name, lambda file, data=data: Path(file).write_bytes(data))
    return {key: folder / name for key, (name, _) in files.items()}


def markdown_table(summary, columns=None):
    """Means over targets as a Markdown table: a row a method and kind, intervals in brackets.

    Args:
        columns: keys; by default UA, IRA, CRA and their harmonic mean, or without those all main
            columns, or without any all columns.
    """
    columns = _chosen(summary, columns)
    groups = kinds_first(summary["means"])
    several = len(groups) > 1
    lines = _table_head((["targets"] if several else []) + ["method"], columns)
    for kind, means in groups:
        rows = [(mean["method"], mean["values"]) for mean in means]
        lines += _table_rows([kind] if several else [], rows, columns)
    return "\n".join(lines) + "\n"


def in_short(summary):
    """A line a method with the compact table's columns, means over all targets, no intervals."""
    columns = _chosen(summary, None)
    _, means = kinds_first(summary["means"])[0]
    return "\n".join(
        printable(f"{mean['method']}: {', '.join(_short(mean['values'], c) for c in columns)}")
        for mean in means
    )


def _short(values, column):
    value = values.get(column["key"])
    if not is_measured(value):
        return f"{column['title']} not measured"
    unit = f" {column['unit']}" if column["unit"] else ""
    return f"{column['title']} {number(value['value'], column['unit'])}{unit}"


def target_table(summary):
    """Each target as a Markdown table: a row a target and method."""
    columns = _chosen(summary, None)
    targets = {}
    for row in summary["rows"]:
        key = row["target"], row["kind"]
        targets.setdefault(key, []).append((row["method"], row["values"]))
    lines = _table_head(["target", "kind", "method"], columns)
    for key, rows in targets.items():
        lines += _table_rows(key, rows, columns)
    return "\n".join(lines) + "\n"


def markdown(summary):
    """The whole report as Markdown."""
    parts = [f"# ConceptBench: {_escaped(summary['suite'])}", lead(summary)]
    parts.append("\n".join(f"- {name}: {_escaped(text)}" for name, text in facts(summary)))
    parts += ["## Results", markdown_table(summary).strip()]
    for group, (heading, _) in GROUPS.items():
        keys = [column["key"] for column in columns_of(summary, group)]
        if any(is_measured(mean["values"].get(key)) for mean in summary["means"] for key in keys):
            parts += [f"## {heading}", markdown_table(summary, keys).strip()]
    parts += ["## Each target", target_table(summary).strip(), "## Columns"]
    parts.append(
        "\n".join(
            f"- **{_escaped(c['title'])}**: {_escaped(c['what'])}" for c in summary["columns"]
        )
    )
    if summary["notes"]:
        parts += ["## Notes", "\n".join(f"- {_escaped(note)}" for note in summary["notes"])]
    return "\n\n".join(parts) + "\n"


def check(summary):
    """Refuse a summary that no honest report can be made of.

    Raises:
        ForgetError: a field is missing or of another type, nothing was measured, a value belongs
            to no column, or one is not finite.
    """
    for field in TEXTS:
        _require(isinstance(summary.get(field), str), f"'{field}' is no text")
    for field, kind in FIELDS.items():
        _require(isinstance(summary.get(field), kind), f"'{field}' is no {kind.__name__}")
    _require("check" in summary, "'check' is missing")
    if not summary["rows"] or not summary["columns"]:
        raise ForgetError(
            "The summary is empty, a report needs a measured target: run the bench first."
        )
    for column in summary["columns"]:
        _require(column.get("group") in ("main", *GROUPS), f"column {column} has no known group")
        _require(column.get("better") in ("high", "low", None), f"column {column} has no direction")
    keys = [column["key"] for column in summary["columns"]]
    _require(len(set(keys)) == len(keys), "a column comes twice")
    for field, name in (("rows", "target"), ("means", "kind")):
        _check_rows(summary[field], name, set(keys))
    for row in summary.get("scale", []):
        _require(isinstance(row.get("concepts"), list), "a stage of many concepts names none")
        for value in row.values():
            if isinstance(value, dict):
                _check_value(value)
    for grid in summary["grids"]:
        for row in grid["rows"]:
            _require(len(row["pictures"]) == len(grid["columns"]), "a grid's row lacks pictures")
            for text in row["pictures"]:
                picture(text)


def _check_rows(rows, name, keys):
    seen = set()
    for row in rows:
        place = row.get(name), row.get("method")
        _require(all(isinstance(text, str) for text in place), f"a row has no {name} or method")
        _require(place not in seen, f"{place} comes twice")
        seen.add(place)
        unknown = set(row["values"]) - keys
        _require(not unknown, f"{sorted(unknown)} of {place} have no column")
        for value in row["values"].values():
            _check_value(value)


def _check_value(value):
    if value is None:
        return
    numbers = [value.get(end) for end in ("value", "low", "high")]
    for one in numbers:
        right = one is None or (isinstance(one, (int, float)) and math.isfinite(one))
        _require(right, f"value {one} is not a finite number")
    _, low, high = numbers
    _require((low is None) == (high is None), f"an interval from {low} to {high} has one end")
    _require(low is None or low <= high, f"an interval from {low} to {high} is upside down")


def _require(right, what):
    if not right:
        raise ForgetError(
            f"The summary cannot be reported, {printable(what)[:200]}: measure again, or write it "
            "as fmn.bench.reporting.summary does."
        )


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _json(summary):
    """The summary without pictures, keys in order."""
    grids = [
        {**grid, "rows": [{"label": row["label"]} for row in grid["rows"]]}
        for grid in summary["grids"]
    ]
    text = json.dumps(summary | {"grids": grids}, sort_keys=True, indent=1, allow_nan=False)
    return text + "\n"


def _chosen(summary, keys):
    by_key = {column["key"]: column for column in summary["columns"]}
    if keys is None:
        main = [column["key"] for column in columns_of(summary, "main")]
        keys = [key for key in COMPACT if key in main] or main or list(by_key)
    unknown = [key for key in keys if key not in by_key]
    if unknown:
        raise ForgetError(
            f"{unknown} are no columns of this summary: choose from {', '.join(by_key)}."
        )
    return [by_key[key] for key in keys]


def _table_head(names, columns):
    units = [f" ({_escaped(c['unit'])})" if c["unit"] else "" for c in columns]
    titles = [_escaped(c["title"]) + unit for c, unit in zip(columns, units)]
    return [_line(names + titles), _line(["---"] * len(names) + ["---:"] * len(columns))]


def _table_rows(lead_cells, rows, columns):
    best = {column["key"]: best_rows(rows, column) for column in columns}
    return [
        _line(
            [_escaped(text) for text in (*lead_cells, method)]
            + [_cell(values, column, method in best[column["key"]]) for column in columns]
        )
        for method, values in rows
    ]


def _cell(values, column, leads):
    value = values.get(column["key"])
    if not is_measured(value):
        return "not measured"
    text, ends = number(value["value"], column["unit"]), interval(value, column["unit"])
    text = f"**{text}**" if leads else text
    return f"{text} ({ends})" if ends else text


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _escaped(text):
    """A stranger's text that Markdown leaves as it is."""
    text = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|!#~>])", r"\\\1", text)
