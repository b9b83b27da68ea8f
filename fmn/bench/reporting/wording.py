"""What the page and the Markdown of a report have in common: numbers, order and facts in words."""

import math

from ...errors import ForgetError
from ..names import UNTOUCHED
from .plots import methods
from .statistics import RELIABLE, clearly_best


def number(value, unit):
    """A value in words: shares as a percentage with one decimal, others with three figures;
    percentages below 1 with two figures.

    Raises:
        ForgetError: it is not finite.
    """
    if not math.isfinite(value):
        raise ForgetError(f"A value is {value}, a finite number was expected: measure it again.")
    if unit == "%":
        small = 0 < abs(100 * value) < 0.95
        return f"{100 * value:#.2g}" if small else f"{100 * value:.1f}"
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:#.3g}"


def interval(value, unit):
    """ "85.0 to 98.2" or "", with the number of pictures where it is too small to rely on."""
    if value.get("low") is None or value.get("high") is None:
        return ""
    few = f", n {value['n']}" if value.get("n", RELIABLE) < RELIABLE else ""
    return f"{number(value['low'], unit)} to {number(value['high'], unit)}{few}"


def best_rows(rows, column):
    """The method that leads a column beyond all intervals, in a set; empty if none does.

    Args:
        rows: (method, values). The untouched model takes no part.
    """
    rivals = [(name, values.get(column["key"])) for name, values in rows if name != UNTOUCHED]
    place = clearly_best([value for _, value in rivals], column["better"])
    return set() if place is None else {rivals[place][0]}


def kinds_first(means):
    """Means by kind, "all" first: a list of (kind, [mean])."""
    kinds = sorted(dict.fromkeys(mean["kind"] for mean in means), key=lambda kind: kind != "all")
    return [(kind, [mean for mean in means if mean["kind"] == kind]) for kind in kinds]


def columns_of(summary, group):
    """The columns of a group."""
    return [column for column in summary["columns"] if column["group"] == group]


def facts(summary):
    """What was measured on what: pairs of a name and a text."""
    model, version = summary["model"], summary.get("version")
    sampling = ", ".join(f"{name} {value}" for name, value in summary["sampling"].items())
    return [
        ("Model", f"{model['family']}, fingerprint {model['fingerprint']}"),
        ("Judge", summary["judge"]),
        ("Second judge", summary["check"] or "none"),
        ("Sampling", sampling or "not recorded"),
        ("Made", summary["made"] + (f", version {version}" if version else "")),
        ("Command", summary["command"] or "not recorded"),
    ]


def lead(summary):
    """One sentence: how many methods on how many targets."""
    names = [name for name in methods(summary) if name != UNTOUCHED]
    targets = {row["target"] for row in summary["rows"]}
    count = f"{len(names)} method{'s' * (len(names) != 1)}"
    return (
        f"{count} of forgetting on {len(targets)} target{'s' * (len(targets) != 1)}: "
        "is the concept gone, is the rest still there, how robust, at what cost."
    )
