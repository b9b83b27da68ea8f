"""Plots of a summary: bars with intervals, and what was erased against what was kept."""

import math
from dataclasses import dataclass

from PIL import Image

from ..names import UNTOUCHED
from .sheet import (
    INK,
    PALE,
    PAPER,
    SOFT,
    STRIPE,
    Axis,
    Sheet,
    axis_for,
    colour_of,
    draw_legend,
    ends_of,
    is_measured,
    legend,
    legible,
    mix,
    place_labels,
    side_by_side,
    text_width,
)

WIDTH = 960
PANELS = 4  # side by side
CROWD = 60
KEPT = "IRA", "CRA"
SHAPES = {"identity": "circle", "object": "square", "style": "diamond", "unsafe": "triangle"}
SPARE = "wedge", "pentagon"  # for other kinds


@dataclass(frozen=True)
class Plot:
    """A finished plot: a name for its file, a title, a text instead of it, and the PIL picture."""

    name: str
    title: str
    alt: str
    image: Image.Image


def plots(summary):
    """All plots that the summary has values for, a list of ``Plot``."""
    columns = {column["key"]: column for column in summary["columns"]}
    shares = [c for c in summary["columns"] if c["group"] == "main" and c["unit"] == "%"]
    targets, ways = len(_targets(summary)), ", ".join(methods(summary))
    found = []
    if shares:
        shares = shares[:PANELS]
        titles = ", ".join(column["title"] for column in shares)
        image = bars_with_intervals(summary, [column["key"] for column in shares])
        alt = f"Bars of {titles} for {targets} targets and the methods {ways}, with intervals."
        found.append(Plot("bars", "Each target, with intervals", alt, image))
    if {"UA", *KEPT} <= columns.keys() and _points(summary):
        alt = f"{targets} targets with the methods {ways}: how much is kept, against UA."
        found.append(
            Plot(
                "erased-vs-kept",
                "Erased against kept: the best is at the top right",
                alt,
                erased_vs_kept(summary),
            )
        )
    if _probes(summary):
        alt = f"Bars of each probe for the methods {ways}, with intervals."
        found.append(Plot("probes", "Still drawn, by probe", alt, probe_bars(summary)))
    return found


def methods(summary):
    """Names of methods in the order in which they come, the untouched model first."""
    names = dict.fromkeys(row["method"] for row in [*summary["rows"], *summary["means"]])
    return sorted(names, key=lambda name: name != UNTOUCHED)


def bars_with_intervals(summary, keys):
    """Bars with whiskers: a panel a column, rows of targets under the heading of their kind.

    Args:
        keys: of columns. A bar that was not measured is a small ring.
    """
    columns = {column["key"]: column for column in summary["columns"]}
    panels = [(key, columns[key]) for key in keys]
    sections = {}
    for kind, target in _targets(summary):
        sections.setdefault(kind, []).append((target, target))
    values = {(row["target"], row["method"]): row["values"] for row in summary["rows"]}

    def find(key, target, method):
        return values.get((target, method), {}).get(key)

    return _bars(panels, sections, methods(summary), find)


def probe_bars(summary):
    """Bars with whiskers: rows of probes (columns in % of groups text and beyond), a panel a kind
    of target."""
    kinds = list(dict.fromkeys(mean["kind"] for mean in summary["means"]))
    kinds.sort(key=lambda kind: kind != "all")
    sections = {}
    for column in _probes(summary):
        heading = {"text": "by text", "beyond": "beyond text"}[column["group"]]
        sections.setdefault(heading, []).append((column["key"], column["title"]))
    values = {(mean["kind"], mean["method"]): mean["values"] for mean in summary["means"]}

    def find(kind, key, method):
        return values.get((kind, method), {}).get(key)

    better = {column["better"] for column in _probes(summary)} - {None}
    shared = {"unit": "%", "better": better.pop() if len(better) == 1 else None}
    titles = {"all": "all targets"}
    panels = [(kind, {"title": titles.get(kind, kind), **shared}) for kind in kinds]
    return _bars(panels, sections, methods(summary), find)


def _probes(summary):
    measured = {
        key
        for mean in summary["means"]
        for key, value in mean["values"].items()
        if is_measured(value)
    }
    return [
        column
        for column in summary["columns"]
        if column["group"] in ("text", "beyond")
        and column["unit"] == "%"
        and column["key"] in measured
    ]


def _targets(summary):
    pairs = dict.fromkeys((row["kind"], row["target"]) for row in summary["rows"])
    kinds = list(dict.fromkeys(kind for kind, _ in pairs))
    return sorted(pairs, key=lambda pair: kinds.index(pair[0]))


def _bars(panels, sections, names, find):
    """Horizontal bars.

    Args:
        panels: (key, {"title", "unit", "better"}). sections: heading -> [(row key, label)].
        find: function of panel key, row key, method to a value or None.
    """
    thick = {1: 12, 2: 9, 3: 7}.get(len(names), 5)
    row_height = thick * len(names) + 8
    gutter = 24 + max(
        text_width(legible(label, 12, 150), 12) for rows in sections.values() for _, label in rows
    )
    lines = legend(names, WIDTH - 40)
    body = sum(24 + len(rows) * row_height for rows in sections.values())
    block = 44 + body + 26
    bands = [panels[i : i + PANELS] for i in range(0, len(panels), PANELS)]
    head = 20 + 20 * len(lines)
    sheet = Sheet(WIDTH, head + len(bands) * block + 8)
    draw_legend(sheet, lines, 20, 20)
    across = min(PANELS, len(panels))
    panel_width = (WIDTH - gutter - 20) / across
    for i, band in enumerate(bands):
        top = head + i * block
        _stripes(sheet, sections, top + 44, row_height)
        for j, (key, column) in enumerate(band):
            left = gutter + j * panel_width
            right = left + panel_width - 24
            rows = [(row, name) for part in sections.values() for row, _ in part for name in names]
            values = [find(key, row, name) for row, name in rows]
            axis = axis_for(values, column["unit"], left, right)
            _frame(sheet, axis, column, top, body)
            y = top + 44
            for part in sections.values():
                y += 24
                for row, _ in part:
                    for k, name in enumerate(names):
                        middle = y + 4 + thick * (k + 0.5)
                        value, colour = find(key, row, name), colour_of(names, name)
                        _bar(sheet, axis, middle, thick, colour, value)
                    y += row_height
    return sheet.finished()


def _stripes(sheet, sections, y, row_height):
    """Headings and labels of rows, every other row on a stripe."""
    for heading, rows in sections.items():
        sheet.text(12, y + 14, legible(heading, 11, 300), 11, SOFT, bold=True)
        y += 24
        for i, (_, label) in enumerate(rows):
            if i % 2 == 0:
                sheet.box(8, y, WIDTH - 8, y + row_height, STRIPE)
            sheet.text(12, y + row_height / 2, legible(label, 12, 150))
            y += row_height


def _frame(sheet, axis, column, top, body):
    """A panel's title, what is better, and its axis."""
    unit = f" ({column['unit']})" if column["unit"] else ""
    room = axis.end - axis.start + 20
    sheet.text(axis.start, top + 10, legible(column["title"] + unit, 12, room), 12, bold=True)
    note = {"high": "higher is better", "low": "lower is better"}.get(column["better"])
    if note:
        sheet.text(axis.start, top + 27, note, 10, SOFT)
    for value, label in axis.ticks():
        x = axis.at(value)
        sheet.line([(x, top + 44), (x, top + 44 + body)], SOFT if value == 0 else PALE, 0.75)
        sheet.text(x, top + 44 + body + 10, label, 10, SOFT, "mm")


def _bar(sheet, axis, y, thick, colour, value):
    zero = axis.at(0)
    if not is_measured(value):
        sheet.mark("circle", zero + 6, y, thick * 0.3, PAPER, SOFT)
        return
    ends_of(value)
    end, half = axis.at(value["value"]), thick / 2 - 0.5
    sheet.box(min(zero, end), y - half, max(zero, end, min(zero, end) + 0.5), y + half, colour)
    if value.get("low") is not None and value.get("high") is not None:
        low, high, cap = axis.at(value["low"]), axis.at(value["high"]), thick * 0.28
        sheet.line([(low, y), (high, y)], INK, 1)
        for x in (low, high):
            sheet.line([(x, y - cap), (x, y + cap)], INK, 1)


def erased_vs_kept(summary):
    """UA against the mean of IRA and CRA: a mark a target and method, its shape by kind.

    The horizontal whisker has the means of both intervals' ends: IRA and CRA come from the same
    pictures, so this is about as wide as their mean's own interval, or wider. Marks at the same
    place stand side by side. With more than ``CROWD`` marks, whiskers and names are left out.
    """
    points, names = _points(summary), methods(summary)
    kinds = list(dict.fromkeys(point.kind for point in points))
    lines = legend(names, 720)
    top = 36 + 20 * (len(lines) + 1)
    bottom = top + 460
    sheet = Sheet(760, bottom + 62)
    draw_legend(sheet, lines, 20, 20)
    _shape_legend(sheet, kinds, 20, 20 + 20 * len(lines))
    across = _share_axis([point.kept for point in points], 64 + 14, 736 - 14)
    up = _share_axis([point.erased for point in points], bottom - 14, top + 14)
    _grid(sheet, across, up, (64, top, 736, bottom))
    places = side_by_side(
        [(across.at(point.kept["value"]), up.at(point.erased["value"])) for point in points]
    )
    crowded = len(points) > CROWD
    for point, place in zip(points, places):
        if not crowded:
            _cross(sheet, across, up, point, place, mix(colour_of(names, point.method), 0.4))
    for point, place in zip(points, places):
        sheet.mark(_shape(kinds, point.kind), *place, 5, colour_of(names, point.method))
    labels = [None if crowded else legible(point.target, 10, 110) for point in points]
    left_out = _label(sheet, places, labels, (66, top + 2, 734, bottom - 2))
    if left_out:
        note = f"names left out where marks are crowded: {left_out} of {len(points)}"
        sheet.text(736, bottom + 52, note, 9, SOFT, "rm")
    return sheet.finished()


def _label(sheet, places, labels, bounds):
    """Write a name beside each mark; returns how many found no place."""
    if None in labels:
        return len(labels)
    corners = place_labels([(*place, text) for place, text in zip(places, labels)], bounds)
    for text, corner in zip(labels, corners):
        if corner:
            sheet.text(*corner, text, 10, INK, "la", halo=True)
    return corners.count(None)


@dataclass(frozen=True)
class _Point:
    target: str
    kind: str
    method: str
    kept: dict
    erased: dict


def _points(summary):
    points = []
    for row in summary["rows"]:
        values = row["values"]
        if all(is_measured(values.get(key)) for key in ("UA", *KEPT)):
            kept = _mean_of([values[key] for key in KEPT])
            points.append(_Point(row["target"], row["kind"], row["method"], kept, values["UA"]))
    return points


def _mean_of(values):
    return {
        end: sum(value[end] for value in values) / len(values)
        for end in ("value", "low", "high")
        if all(value.get(end) is not None for value in values)
    }


def _share_axis(values, start, end):
    """From the ten below the lowest value to 100 %, at least 40 points long."""
    lowest = min(end for value in values for end in ends_of(value))
    low = min(60, max(0, 10 * math.floor(lowest * 10 + 1e-9)))
    return Axis(low, 100, 10, 100, start, end)


def _grid(sheet, across, up, box):
    left, top, right, bottom = box
    for value, label in across.ticks():
        sheet.line([(across.at(value), top), (across.at(value), bottom)], PALE, 0.75)
        sheet.text(across.at(value), bottom + 12, label, 10, SOFT, "mm")
    for value, label in up.ticks():
        sheet.line([(left, up.at(value)), (right, up.at(value))], PALE, 0.75)
        sheet.text(left - 8, up.at(value), label, 10, SOFT, "rm")
    sheet.line([(left, top), (left, bottom), (right, bottom)], SOFT, 0.75)
    middle = (left + right) / 2
    sheet.text(middle, bottom + 34, "kept: mean of IRA and CRA (%)", 12, INK, "mm", bold=True)
    sheet.text_upwards(18, (top + bottom) / 2, "erased: UA (%)", 12)


def _cross(sheet, across, up, point, place, colour):
    x, y = place
    if "low" in point.kept and "high" in point.kept:
        ends = across.at(point.kept["low"]), across.at(point.kept["high"])
        sheet.line([(ends[0], y), (ends[1], y)], colour, 1.25)
    if point.erased.get("low") is not None and point.erased.get("high") is not None:
        ends = up.at(point.erased["low"]), up.at(point.erased["high"])
        sheet.line([(x, ends[0]), (x, ends[1])], colour, 1.25)


def _shape(kinds, kind):
    others = [name for name in kinds if name not in SHAPES]
    return SHAPES.get(kind) or SPARE[others.index(kind) % len(SPARE)]


def _shape_legend(sheet, kinds, left, y):
    for kind in kinds:
        text = legible(kind, 12, 160)
        sheet.mark(_shape(kinds, kind), left + 6, y, 5, SOFT)
        sheet.text(left + 18, y, text)
        left += 18 + text_width(text, 12) + 20
