"""A summary as one HTML file that needs nothing else: no script, no network.

Names in patches and suites are a stranger's words. All text is escaped, and the page forbids
itself to load or run anything.
"""

import base64
import binascii
import html
from pathlib import Path

from ...errors import ForgetError
from ...text import printable
from ..names import UNTOUCHED
from .plots import methods
from .sheet import colour_of, is_measured
from .statistics import LEVEL, RELIABLE
from .wording import best_rows, columns_of, facts, interval, kinds_first, lead, number

STYLE = Path(__file__).parents[2] / "assets" / "report.css"
PNG = b"\x89PNG\r\n\x1a\n"
RULES = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
GROUPS = {  # group -> heading, what it is about; "main" and "text", "beyond" come first
    "text": ("Robust to other words", "How much comes back when the target is asked for by other "
             "words, or by words that were searched for."),
    "beyond": ("Robust beyond words", "How much comes back when the pictures, the noise or the "
               "weights help."),
    "precision": ("Precision", "How sharp the line between target and neighbours is."),
    "scale": ("Many at once", "What is left when several patches are worn together."),
    "cost": ("Cost", "What forgetting takes."),
}  # fmt: skip
BETTER = {"high": "\u2191 higher is better", "low": "\u2193 lower is better", None: ""}
SHARES = "UA", "IRA", "CRA"
OPEN = 2  # picture grids that are unfolded at first


def page(summary, figures):
    """The whole page as text.

    Args:
        summary: a checked summary. figures: pairs of a ``plots.Plot`` and its PNG as bytes.
    """
    parts = [("results", "Results", _results(summary))]
    by_name = {plot.name: (plot, png) for plot, png in figures}
    for name in ("erased-vs-kept", "bars"):
        if name in by_name:
            parts[0][2].append(_figure(*by_name[name]))
    contents = {group: _group(summary, group) for group in GROUPS}
    if "probes" in by_name:
        last = "beyond" if contents["beyond"] else "text"
        contents[last].append(_figure(*by_name["probes"]))
    for group, (heading, about) in GROUPS.items():
        if contents[group]:
            parts.append((group, heading, [f"<p>{about}</p>", *contents[group]]))
    if targets := _targets(summary, "main"):
        parts.append(("targets", "Each target", targets))
    if summary["grids"]:
        parts.append(("pictures", "Pictures", _grids(summary["grids"])))
    if summary["notes"]:
        notes = "".join(f"<li>{_text(note)}</li>" for note in summary["notes"])
        parts.append(("notes", "Notes", [f"<ul>{notes}</ul>"]))
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in parts)
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{"".join(content)}'
        "</section>\n"
        for name, heading, content in parts
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{RULES}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ConceptBench: {_plain(summary['suite'])}</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head>\n<body>"
        f'{_header(summary)}<nav aria-label="Contents">{links}</nav>\n'
        f"<main>{sections}</main></body></html>\n"
    )


def _text(value):
    """A stranger's text: escaped, without control characters, its direction kept to itself."""
    return f"<bdi>{html.escape(printable(str(value)))}</bdi>"


def _header(summary):
    rows = []
    for name, text in facts(summary):
        text = f"<code>{_text(text)}</code>" if name == "Command" else _text(text)
        rows.append(f"<dt>{name}</dt><dd>{text}</dd>")
    return (
        f"<header><h1>ConceptBench: {_text(summary['suite'])}</h1>"
        f'<p class="lead">{_text(lead(summary))}</p><dl class="facts">{"".join(rows)}</dl></header>'
    )


def _plain(value):
    """For attributes and the title, which hold no elements."""
    return html.escape(printable(str(value)))


def _results(summary):
    note = (
        f"Small type: the {100 * LEVEL:.0f} % percentile bootstrap interval over pictures, each "
        "with its own seed. It tells what other seeds would give, not other targets or another "
        "training. One of no width means that all pictures agree. Bold: the interval is beyond "
        "those of all other methods; the untouched model takes no part. From fewer than "
        f"{RELIABLE} pictures (then n is told) an interval cannot be relied on."
    )
    return [*_means(summary, "main"), f'<p class="note">{note}</p>']


def _group(summary, group):
    """Table of means and, folded, of targets, for the columns of a group."""
    parts = _means(summary, group)
    for targets in _targets(summary, group):
        parts.append(f"<details><summary>Each target</summary>{targets}</details>")
    if group == "scale" and summary.get("scale"):
        parts.append(_scale(summary))
    return parts


def _means(summary, group):
    columns = columns_of(summary, group)
    sections = [
        (_kind_heading(kind, means), [(mean["method"], mean["values"]) for mean in means])
        for kind, means in kinds_first(summary["means"])
    ]
    if not _some(sections, columns):
        return []
    return [_table(summary, "Means over targets", columns, sections), _legend(columns)]


def _kind_heading(kind, means):
    count = max(len(mean["targets"]) for mean in means)
    name = "all targets" if kind == "all" else kind
    return f"{_text(name)} ({count})"


def _targets(summary, group):
    """The table of targets for the columns of a group, in a list; empty if nothing was measured."""
    columns = columns_of(summary, group)
    sections = {}
    for row in summary["rows"]:
        rows = sections.setdefault((row["kind"], row["target"]), [])
        rows.append((row["method"], row["values"]))
    kinds = list(dict.fromkeys(kind for kind, _ in sections))
    ordered = sorted(sections.items(), key=lambda item: kinds.index(item[0][0]))
    told = [(f"{_text(target)} · {_text(kind)}", rows) for (kind, target), rows in ordered]
    return [_table(summary, "Each target", columns, told)] if _some(told, columns) else []


def _some(sections, columns):
    return any(
        is_measured(values.get(column["key"]))
        for _, rows in sections
        for _, values in rows
        for column in columns
    )


def _table(summary, caption, columns, sections):
    """A table with a body a section: a heading over all columns, then a row a method.

    Args:
        sections: (heading as HTML, [(method, values)]).
    """
    heads = "".join(f'<th scope="col">{_head(column)}</th>' for column in columns)
    bodies = []
    for heading, rows in sections:
        cells = f'<tr><th scope="rowgroup" colspan="{len(columns) + 1}">{heading}</th></tr>'
        best = {column["key"]: best_rows(rows, column) for column in columns}
        for method, values in rows:
            kind = ' class="reference"' if method == UNTOUCHED else ""
            cells += f'<tr{kind}><th scope="row">{_method(summary, method)}</th>'
            for column in columns:
                leads = method in best[column["key"]]
                cells += _cell(values.get(column["key"]), column["unit"], leads)
            cells += "</tr>"
        bodies.append(f"<tbody>{cells}</tbody>")
    few = ' class="few"' if len(columns) < 4 else ""
    return _scroll(
        caption,
        f"<table{few}><caption>{caption}</caption><thead><tr>"
        f'<th scope="col">Method</th>{heads}</tr></thead>{"".join(bodies)}</table>',
    )


def _scroll(name, content):
    """A box that scrolls sideways on small screens, by keys too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">{content}</div>'


def _head(column):
    unit = f" ({_plain(column['unit'])})" if column["unit"] else ""
    arrow = {"high": "\u2191", "low": "\u2193", None: ""}[column["better"]]
    return f"{_text(column['title'])}<small>{arrow}{unit}</small>"


def _method(summary, name):
    colour = "#{:02x}{:02x}{:02x}".format(*colour_of(methods(summary), name))
    return f'<span class="key" style="background:{colour}"></span>{_text(name)}'


def _cell(value, unit, leads=False):
    if not is_measured(value):
        return '<td class="none">not measured</td>'
    text = number(value["value"], unit).replace("-", "\u2212")
    text = f"<b>{text}</b>" if leads else text
    ends = interval(value, unit).replace("-", "\u2212")
    return f"<td>{text}<small>{ends}</small></td>" if ends else f"<td>{text}</td>"


def _legend(columns):
    items = "".join(
        f"<dt>{_text(column['title'])}</dt>"
        f"<dd>{_text(column['what'])} {BETTER[column['better']]}</dd>"
        for column in columns
    )
    return f'<dl class="legend">{items}</dl>'


def _scale(summary):
    """Stages of many concepts: how many were forgotten, what is erased and what is kept."""
    keys = list(dict.fromkeys(key for row in summary["scale"] for key in row if key in SHARES))
    heads = "".join(f'<th scope="col">{key}<small> (%)</small></th>' for key in keys)
    cells = "".join(
        f'<tr><th scope="row">{_method(summary, row["method"])}</th><td>{_text(row["what"])}</td>'
        f"<td>{len(row['concepts'])}</td>"
        + "".join(_cell(row.get(key), "%") for key in keys)
        + "</tr>"
        for row in summary["scale"]
    )
    return _scroll(
        "Many concepts",
        "<table><caption>Many concepts: pictures of all forgotten ones, and of kept ones</caption>"
        '<thead><tr><th scope="col">Method</th><th scope="col">How</th>'
        f'<th scope="col">Concepts</th>{heads}</tr></thead><tbody>{cells}</tbody></table>',
    )


def _figure(plot, png):
    data = base64.b64encode(png).decode()
    return (
        f"<figure><figcaption>{_text(plot.title)}</figcaption>"
        f'<div class="scroll sheet" role="region" tabindex="0" aria-label="{_plain(plot.title)}">'
        f'<img src="data:image/png;base64,{data}" alt="{_plain(plot.alt)}" '
        f'style="max-width: {plot.image.width // 2}px"></div></figure>'
    )


def _grids(grids):
    parts = ["<p>Pictures at equal seeds, side by side in the order told in brackets.</p>"]
    for place, grid in enumerate(grids):
        frames = "".join(_frame(row, grid["columns"]) for row in grid["rows"])
        columns = ", ".join(_text(column) for column in grid["columns"])
        parts.append(
            f"<details{' open' * (place < OPEN)}><summary>{_text(grid['title'])} "
            f'<small>({columns})</small></summary><div class="frames">{frames}</div></details>'
        )
    return parts


def _frame(row, columns):
    pictures = "".join(
        f'<img src="data:image/png;base64,{picture(text)}" '
        f'alt="{_plain(row["label"])}: {_plain(column)}">'
        for text, column in zip(row["pictures"], columns)
    )
    return f"<figure><div>{pictures}</div><figcaption>{_text(row['label'])}</figcaption></figure>"


def picture(text):
    """The base64 of a PNG, made anew.

    Raises:
        ForgetError: it is not base64 of a PNG.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        data = b""
    if not data.startswith(PNG):
        raise ForgetError(
            "A picture of a grid is no PNG, base64 of a PNG was expected: draw the pictures again."
        )
    return base64.b64encode(data).decode()
