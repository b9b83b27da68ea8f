"""Plots of a summary: numbers of methods with intervals, and what is erased against what is kept.

Importing this module loads matplotlib. Figures are drawn without pyplot, which has global state.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...text import printable
from ..names import UNTOUCHED
from .columns import Column
from .statistics import Value
from .summary import MeanRow, Summary
from .tables import columns_of, number, overall_means

INK, SOFT, PALE, STRIPE = "#1f2328", "#656d76", "#d0d5da", "#f4f5f7"
BLUE, GREY = "#0072b2", "#8c939a"  # methods, the untouched model
WIDTH, DPI, PIXELS = 9.6, 200, 100  # inches; pixels per inch of the file and of the page
ROW, PANELS = 0.27, 4  # height of a method in inches, panels side by side
NAME = 32  # letters of a method's name that are shown
Errors = list[list[float]] | None  # how far an interval reaches below and above, in %
BETTER = {"high": "(higher is better)", "low": "(lower is better)", None: ""}


@dataclass(frozen=True)
class Plot:
    """A plot: a name for its file, a title, a text to show instead, and the figure."""

    name: str
    title: str
    alt: str
    figure: Figure

    @property
    def width(self) -> int:
        """Pixels on the page; the file has twice as many."""
        return round(self.figure.get_figwidth() * PIXELS)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=DPI)
        return file.getvalue()


def plots(summary: Summary) -> list[Plot]:
    """All plots that the summary has values for."""
    means = overall_means(summary)
    methods = ", ".join(mean["method"] for mean in means)
    shares = [c for c in columns_of(summary, "main") if c["unit"] == "%"][:PANELS]
    probes = [c for g in ("text", "beyond") for c in columns_of(summary, g) if c["unit"] == "%"]
    made = []
    if shares:
        titles = ", ".join(column["title"] for column in shares)
        alt = f"{titles} of the methods {methods}, means over targets with 95 % intervals."
        made.append(Plot("bars", "Methods, best first", alt, dot_plot(summary, shares)))
    if any({"UA", "kept"} <= mean["values"].keys() for mean in means):
        alt = f"UA against the mean of IRA and CRA for the methods {methods}, with 95 % intervals."
        title = "Erased against kept: the best is at the top right"
        made.append(Plot("erased-vs-kept", title, alt, scatter_plot(means)))
    if probes:
        alt = f"Share of pictures that still show the target, by probe, for the methods {methods}."
        made.append(Plot("probes", "Still drawn, by probe", alt, dot_plot(summary, probes)))
    return made


def dot_plot(summary: Summary, columns: Sequence[Column]) -> Figure:
    """A panel a column, a row a method: a dot with its interval, and a pale tick a target."""
    means = _best_first(overall_means(summary), columns)
    across, down = min(PANELS, len(columns)), -(-len(columns) // PANELS)
    height = (ROW * len(means) + 0.85) * down + 0.2
    figure = Figure((WIDTH, height), layout="constrained", facecolor="white")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes, column in zip(panels, columns):
        _panel(axes, column, means, summary)
    for axes in panels[len(columns) :]:
        axes.set_visible(False)
    note = "Dot and line: mean over targets with 95 % interval. Ticks: each target."
    figure.supxlabel(note, x=0.99, ha="right", fontsize=7.5, color=SOFT)
    return figure


def _best_first(means: Sequence[MeanRow], columns: Sequence[Column]) -> list[MeanRow]:
    """By the harmonic mean if there is one, else by the mean of all columns; untouched last."""
    by = [column for column in columns if column["key"] == "HM"] or columns

    def rank(mean: MeanRow) -> tuple[bool, float]:
        measured = [(c["better"], mean["values"].get(c["key"])) for c in by]
        losses = [
            -value["value"] if better == "high" else value["value"]
            for better, value in measured
            if value is not None
        ]
        return mean["method"] == UNTOUCHED, sum(losses) / len(losses) if losses else 1.0

    return sorted(means, key=rank)


def _panel(axes: Axes, column: Column, means: Sequence[MeanRow], summary: Summary) -> None:
    """One column: shares in %, row 0 on top."""
    key = column["key"]
    for row, mean in enumerate(means):
        method = mean["method"]
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=STRIPE, linewidth=0, zorder=0)
        targets = [
            100 * value["value"]
            for target in summary["rows"]
            if target["method"] == method and (value := target["values"].get(key))
        ]
        axes.plot(targets, [row] * len(targets), "|", color=PALE, markersize=8, markeredgewidth=1.2)
        value = mean["values"].get(key)
        if value is None:
            axes.text(50, row, "not measured", ha="center", va="center", fontsize=7, color=SOFT)
            continue
        _dot(axes, method, 100 * value["value"], row, _errors(value))
        axes.annotate(
            number(value["value"], "%"), (1, row), (28, 0), ("axes fraction", "data"),
            "offset points", ha="right", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set(xlim=(-4, 104), ylim=(len(means) - 0.5, -0.5), xticks=(0, 50, 100))
    names = [_short(mean["method"]) for mean in means]
    _plain(axes)
    axes.set_yticks(range(len(means)), names, parse_math=False, fontsize=9, color=INK)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    axes.set_title(column["title"], loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(f"% {BETTER[column['better']]}", loc="left", fontsize=8, color=SOFT)


def scatter_plot(means: Sequence[MeanRow]) -> Figure:
    """UA against the mean of IRA and CRA: a dot a method, with both intervals.

    Names stand beside the plot in the order of the dots, joined to them by lines.
    """
    shown = [mean for mean in means if {"UA", "kept"} <= mean["values"].keys()]
    shown.sort(key=lambda mean: mean["values"]["UA"]["value"])
    heights = [mean["values"]["UA"]["value"] for mean in shown]
    figure = Figure((WIDTH, max(5.0, ROW * len(shown))), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for mean, height in zip(shown, _spread(heights, 0.9 * ROW / figure.get_figheight())):
        erased, kept = mean["values"]["UA"], mean["values"]["kept"]
        x, y = 100 * kept["value"], 100 * erased["value"]
        _dot(axes, mean["method"], x, y, _errors(kept), _errors(erased))
        axes.annotate(
            _short(mean["method"]), (x, y), (1.04, height),
            textcoords="axes fraction", va="center", fontsize=9, color=INK, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.8, "shrinkB": 4},
            zorder=1,
        )  # fmt: skip
    axes.set_xlim(right=101)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(-3, 103)
    _plain(axes)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_xlabel("kept: mean of IRA and CRA (%)", fontsize=10, color=INK)
    axes.set_ylabel("erased: UA (%)", fontsize=10, color=INK)
    return figure


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8, labelcolor=SOFT, length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _dot(
    axes: Axes, method: str, x: float, y: float, across: Errors = None, up: Errors = None
) -> None:
    """A method's dot with its intervals."""
    colour = GREY if method == UNTOUCHED else BLUE
    axes.errorbar(
        x, y, xerr=across, yerr=up, fmt="o", color=colour, markersize=5.5, ecolor=(colour, 0.45),
        elinewidth=2, zorder=3,
    )  # fmt: skip


def _errors(value: Value) -> Errors:
    if "low" not in value:
        return None
    middle = value["value"]
    return [[max(0.0, 100 * (middle - value["low"]))], [max(0.0, 100 * (value["high"] - middle))]]


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights between 0 and 1, moved so that neighbours are ``gap`` apart."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def _short(name: str) -> str:
    """A method's name on one line, cut to ``NAME`` letters."""
    name = printable(name)
    return name if len(name) <= NAME else name[: NAME - 1] + "\u2026"
