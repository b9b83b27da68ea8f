"""What the page, the Markdown and the plots share: order, numbers as text, table cells, facts."""

from collections.abc import Sequence
from typing import NamedTuple

from ..names import UNTOUCHED
from .columns import Column
from .statistics import RELIABLE, Value, clearly_best
from .summary import MeanRow, Summary, TargetRow, Values


class Cell(NamedTuple):
    """A cell of a table: its number, empty if not measured, the interval, whether it leads."""

    number: str
    interval: str = ""
    is_best: bool = False


class Body(NamedTuple):
    """Rows of a table under one heading: the first cells (kind, or target and kind), then a pair
    of method and cells a row."""

    heading: tuple[str, ...]
    rows: list[tuple[str, list[Cell]]]


def bodies_of_means(summary: Summary, columns: Sequence[Column]) -> list[Body]:
    """A body a kind of target, "all" first."""
    return [
        _body((kind,), [(mean["method"], mean["values"]) for mean in means], columns)
        for kind, means in means_by_kind(summary)
    ]


def bodies_of_targets(summary: Summary, columns: Sequence[Column]) -> list[Body]:
    """A body a target, by kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in summary["rows"]))
    targets: dict[tuple[str, str], list[TargetRow]] = {}
    for row in sorted(summary["rows"], key=lambda row: kinds.index(row["kind"])):
        targets.setdefault((row["target"], row["kind"]), []).append(row)
    return [
        _body(heading, [(row["method"], row["values"]) for row in rows], columns)
        for heading, rows in targets.items()
    ]


def _body(
    heading: tuple[str, ...], rows: Sequence[tuple[str, Values]], columns: Sequence[Column]
) -> Body:
    best = [_best_method(rows, column) for column in columns]

    def cells(method: str, values: Values) -> list[Cell]:
        return [
            to_cell(values.get(column["key"]), column["unit"], method == leader)
            for column, leader in zip(columns, best)
        ]

    return Body(heading, [(method, cells(method, values)) for method, values in rows])


def _best_method(rows: Sequence[tuple[str, Values]], column: Column) -> str | None:
    """The method that leads a column beyond all intervals; the untouched model takes no part."""
    rivals = [(name, values.get(column["key"])) for name, values in rows if name != UNTOUCHED]
    place = clearly_best([value for _, value in rivals], column["better"])
    return None if place is None else rivals[place][0]


def to_cell(value: Value | None, unit: str, is_best: bool = False) -> Cell:
    """A value as text; the number of pictures stands by intervals too few to rely on."""
    if value is None:
        return Cell("")
    ends = ""
    if "low" in value:
        ends = f"{number(value['low'], unit)} to {number(value['high'], unit)}"
        if value.get("n", RELIABLE) < RELIABLE:
            ends += f", n {value['n']}"
    return Cell(number(value["value"], unit), ends, is_best)


def number(value: float, unit: str) -> str:
    """Shares as a percentage with one decimal, others with three figures; percentages below 1
    with two figures."""
    if unit == "%":
        small = 0 < abs(100 * value) < 0.95
        return f"{100 * value:#.2g}" if small else f"{100 * value:.1f}"
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:#.3g}"


def means_by_kind(summary: Summary) -> list[tuple[str, list[MeanRow]]]:
    """Means over targets by kind, "all" first."""
    kinds = dict.fromkeys(mean["kind"] for mean in summary["means"])
    return [
        (kind, [mean for mean in summary["means"] if mean["kind"] == kind])
        for kind in sorted(kinds, key=lambda kind: kind != "all")
    ]


def overall_means(summary: Summary) -> list[MeanRow]:
    """Means over all targets."""
    return means_by_kind(summary)[0][1]


def columns_of(summary: Summary, group: str) -> list[Column]:
    """The columns of a group that were measured."""
    return [column for column in summary["columns"] if column["group"] == group]


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What was measured on what: pairs of a name and a text."""
    model = summary["model"]
    sampling = ", ".join(f"{name} {value}" for name, value in summary["sampling"].items())
    return [
        ("Model", f"{model['family']}, fingerprint {model['fingerprint']}"),
        ("Judge", summary["judge"]),
        ("Second judge", summary["check"] or "none"),
        ("Sampling", sampling or "not recorded"),
        ("Made", f"{summary['made']}, version {summary['version']}"),
        ("Command", summary["command"] or "not recorded"),
    ]


def lead(summary: Summary) -> str:
    """One sentence: how many methods on how many targets."""
    methods = {row["method"] for row in summary["rows"]} - {UNTOUCHED}
    targets = {row["target"] for row in summary["rows"]}
    return (
        f"{_count(len(methods), 'method')} of forgetting on {_count(len(targets), 'target')}: "
        "is the concept gone, is the rest still there, how robust is that, what did it cost?"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
