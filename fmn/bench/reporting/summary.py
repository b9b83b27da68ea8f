"""From finished cells to the numbers of a report."""

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, TypedDict

from ... import __version__
from ..names import SCALE, UNTOUCHED
from ..running.cells import Cell, CellProgress, Setup
from ..running.store import Store
from ..suite import KINDS, Suite, Target
from .columns import COLUMNS, PAIRED, Column, Result, Results
from .statistics import KEPT, TARGET, Row, Value, bootstrap, is_gone, is_right, paired_difference

RARE = 0.9  # an untouched model that shows a target less often is reported

Values = dict[str, Value]
"""Key of a column -> its value; columns that were not measured are missing."""


class TargetRow(TypedDict):
    """Values of one method on one target."""

    target: str
    kind: str
    method: str
    values: Values


class MeanRow(TypedDict):
    """Values of one method over the targets of a kind, or of the kind "all"."""

    kind: str
    method: str
    targets: list[str]
    values: Values


class StageRow(TypedDict):
    """Values of one method after forgetting a number of concepts."""

    method: str
    what: str
    concepts: int
    UA: Value | None
    IRA: Value | None


class GridRow(TypedDict):
    label: str
    pictures: list[str]  # PNG as base64


class Grid(TypedDict):
    """Pictures of one method on one target; ``columns`` are the names of a row's pictures."""

    title: str
    columns: list[str]
    rows: list[GridRow]


class Summary(TypedDict):
    """All that a report says, as JSON. ``check`` is the second judge."""

    suite: str
    model: dict[str, str]
    sampling: dict[str, Any]
    judge: str
    check: str | None
    made: str
    version: str
    command: str
    notes: list[str]
    columns: list[Column]
    rows: list[TargetRow]
    means: list[MeanRow]
    scale: list[StageRow]
    grids: list[Grid]


Measures = dict[str, Result]  # by measure
ByMethod = dict[tuple[str, str], tuple[Target, Measures]]  # by method and name of the target


def summarise(
    setup: Setup,
    suite: Suite,
    cells: Sequence[Cell],
    store: Store,
    command: str = "",
    failed: Sequence[CellProgress] = (),
) -> Summary:
    """The summary of a bench; only cells in the store count.

    Args:
        cells: of ``cells.plan``. failed: those that failed, for the notes.
    """
    finished = _results(setup, suite, cells, store)
    rows: list[TargetRow] = []
    means: list[MeanRow] = []
    for method in dict.fromkeys(method for method, _ in finished):
        results = [result for (name, _), result in finished.items() if name == method]
        for target, measures in results:
            values, kind = _values([(target, measures)]), target.kind
            rows.append({"target": target.name, "kind": kind, "method": method, "values": values})
        groups = {kind: [r for r in results if r[0].kind == kind] for kind in KINDS}
        groups = {kind: group for kind, group in groups.items() if group}
        if len(groups) > 1:
            groups["all"] = results
        for kind, group in groups.items():
            names, values = [target.name for target, _ in group], _values(group)
            means.append({"kind": kind, "method": method, "targets": names, "values": values})
    _add_paired(means, finished)
    measured = {key for row in (*rows, *means) for key in row["values"]}
    columns = [column for column, _ in COLUMNS]
    columns.insert(1 + [column["key"] for column in columns].index("HM"), PAIRED)
    return {
        "suite": suite.title,
        "model": {"family": setup.model, "fingerprint": setup.fingerprint},
        "sampling": vars(suite.sampling),
        "judge": setup.judge,
        "check": setup.check or None,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "command": command,
        "notes": [*_notes(setup, finished), *map(_failure, failed)],
        "columns": [column for column in columns if column["key"] in measured],
        "rows": rows,
        "means": means,
        "scale": _scale(setup, cells, store),
        "grids": _grids(finished),
    }


def _results(setup: Setup, suite: Suite, cells: Sequence[Cell], store: Store) -> ByMethod:
    """Results by method and target, where more than the training is finished."""
    targets = {target.name: target for target in suite.targets}
    finished: ByMethod = {}
    for cell in cells:
        key, name = cell.key(setup), cell.targets[0]
        if cell.work not in SCALE and name in targets and key in store:
            _, measures = finished.setdefault((cell.method, name), (targets[name], {}))
            measures[cell.work], _ = store.result(key)
    return {pair: result for pair, result in finished.items() if set(result[1]) - {"train"}}


def _values(results: Sequence[tuple[Target, Measures]]) -> Values:
    pooled = Results(results)
    values = {column["key"]: compute(pooled) for column, compute in COLUMNS}
    return {key: value for key, value in values.items() if value is not None}


def _add_paired(means: Sequence[MeanRow], finished: ByMethod) -> None:
    """Give every mean but the first method's its difference from that, on their common targets."""
    methods = [name for name in dict.fromkeys(name for name, _ in finished) if name != UNTOUCHED]
    for mean in means:
        if mean["method"] in (UNTOUCHED, *methods[:1]):
            continue
        pairs: dict[str, tuple[list, list]] = {}
        for name in mean["targets"]:
            if both := _both(finished, name, mean["method"], methods[0]):
                kind = finished[methods[0], name][0].kind
                for each, pictures in zip(pairs.setdefault(kind, ([], [])), both):
                    each.append(pictures)
        if value := paired_difference(list(pairs.values())):
            mean["values"][PAIRED["key"]] = value


def _both(finished: ByMethod, name: str, *methods: str) -> list | None:
    """A target's judged pictures and domain, by each method; None if one has none."""
    found = [finished.get((method, name)) for method in methods]
    given = [pictures for result in found if result for pictures in Results([result]).pictures()]
    return given if len(given) == len(methods) else None


def _notes(setup: Setup, finished: ByMethod) -> list[str]:
    """What limits the numbers: pictures, targets that the model cannot draw, judges that differ."""
    notes = [f"{setup.count} pictures a question, each with its own seed; intervals are 95 %."]
    for (method, name), result in finished.items():
        share = Results([result]).usable() if method == UNTOUCHED else 1
        if share < RARE:
            notes.append(
                f"The judges find '{name}' in only {share:.0%} of the untouched model's pictures; "
                "the others do not count."
            )
    agreed = [
        share
        for _, measures in finished.values()
        for share in (measures.get("pictures", {}).get("agreement") or {}).values()
    ]
    if agreed:
        share = sum(agreed) / len(agreed)
        notes.append(f"The second judge agrees on {share:.1%} of all labels.")
    return notes


def _failure(failed: CellProgress) -> str:
    cell, reason = failed.cell, failed.error.splitlines()[-1]
    return f"Not measured: {cell.work} of {cell.method} on {', '.join(cell.targets[:3])}: {reason}"


def _scale(setup: Setup, cells: Sequence[Cell], store: Store) -> list[StageRow]:
    """The measures of many concepts, after each stage."""
    stages: list[StageRow] = []
    for cell in cells:
        if cell.work not in SCALE or (key := cell.key(setup)) not in store:
            continue
        result, _ = store.result(key)
        if cell.work == "many":
            counts, what = [(result["names"], result["rows"])], "patches trained alone, added"
        else:
            counts = [(stage["forgotten"], stage["rows"]) for stage in result["stages"]]
            what = f"one after another, first {cell.targets[0]}"
        stages += [_stage(cell.method, what, count, rows) for count, rows in counts]
    return stages


def _stage(method: str, what: str, concepts: int, rows: Sequence[Row]) -> StageRow:
    """Only objects and identities are forgotten by the many, so the domain is always concept."""
    gone = [bool(is_gone(row, "concept")) for row in rows if row["group"] == TARGET]
    kept = [bool(is_right(row, "concept")) for row in rows if row["group"] in KEPT]
    erased, left = bootstrap(gone), bootstrap(kept)
    return {"method": method, "what": what, "concepts": concepts, "UA": erased, "IRA": left}


def _grids(finished: ByMethod) -> list[Grid]:
    """Pictures before and after, of every method and target."""
    grids: list[Grid] = []
    for (method, name), (_, measures) in finished.items():
        rows = measures.get("pictures", {}).get("grid")
        if rows and method != UNTOUCHED:
            title = f"{name}, {method}"
            grids.append({"title": title, "columns": ["before", "after"], "rows": rows})
    return grids
