"""From finished cells to the tables of a report."""

from datetime import datetime, timezone

from ... import __version__
from ..names import UNTOUCHED
from .columns import Found, columns
from .statistics import as_value, bootstrap, correct

KINDS_ORDER = ("identity", "object", "style", "unsafe")


def summarise(setup, suite, cells, store, command="", failed=()):
    """The summary that ``report`` writes; only cells in the store count.

    Args:
        cells: of ``cells.plan``. failed: ``runner.Progress`` of those that failed.
    """
    found = _results(setup, suite, cells, store)
    methods = list(dict.fromkeys(method for method, _ in found))
    rows, means = [], []
    for method in methods:
        own = [(suite_target(suite, name), found[m, name]) for m, name in found if m == method]
        rows += [_row(method, [one]) | {"target": one[0].name} for one in own]
        groups = {kind: [one for one in own if one[0].kind == kind] for kind in KINDS_ORDER}
        groups = {kind: some for kind, some in groups.items() if some}
        if len(groups) > 1:
            groups["all"] = own
        means += [
            _row(method, some) | {"kind": kind, "targets": [target.name for target, _ in some]}
            for kind, some in groups.items()
        ]
    measured = {key for row in rows for key in row["values"]}
    return {
        "suite": suite.title,
        "model": {"family": setup.model, "fingerprint": setup.fingerprint},
        "sampling": vars(suite.sampling),
        "judge": setup.judge,
        "check": setup.check or None,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "command": command,
        "notes": [*_notes(setup, suite, found), *_failures(failed)],
        "columns": [column.describe() for column in columns() if column.key in measured],
        "rows": rows,
        "means": means,
        "scale": _scale(setup, cells, store),
        "grids": _grids(found),
    }


def suite_target(suite, name):
    return next(target for target in suite.targets if target.name == name)


def _results(setup, suite, cells, store):
    """(method, target) -> {work: result}, of cells with one target of the suite."""
    found, known = {}, {target.name for target in suite.targets}
    for cell in cells:
        key = cell.key(setup)
        if cell.work in ("many", "sequence") or cell.targets[0] not in known or key not in store:
            continue
        result, _ = store.result(key)
        found.setdefault((cell.method, cell.targets[0]), {})[cell.work] = result
    return {pair: works for pair, works in found.items() if set(works) - {"train"}}


def _row(method, results):
    found = Found(results)
    values = {column.key: column.make(found) for column in columns()}
    return {
        "method": method,
        "kind": results[0][0].kind,
        "values": {key: value for key, value in values.items() if value is not None},
    }


def _notes(setup, suite, found):
    """What a reader has to know: what cannot be drawn anyway, and how far judges agree."""
    notes = [f"{setup.count} pictures a question, each with its own seed; intervals are 95 %."]
    for (method, name), works in found.items():
        if method != UNTOUCHED or "pictures" not in works:
            continue
        share = sum(
            correct([r for r in works["pictures"]["rows"] if r["group"] == "target"],
                    suite_target(suite, name).domain)
        ) / max(1, sum(r["group"] == "target" for r in works["pictures"]["rows"]))  # fmt: skip
        if share < 0.9:
            notes.append(f"The untouched model shows '{name}' in only {share:.0%} of its pictures.")
    agreed = [
        share
        for works in found.values()
        for share in ((works.get("pictures") or {}).get("agreement") or {}).values()
    ]
    if agreed:
        notes.append(
            f"A second judge says the same on {sum(agreed) / len(agreed):.1%} of all labels."
        )
    return notes


def _failures(failed):
    return [
        f"Not measured: {one.cell.work} of {one.cell.method} on {', '.join(one.cell.targets[:3])}: "
        f"{one.error.splitlines()[-1]}"
        for one in failed
    ]


def _scale(setup, cells, store):
    """Rows of the measures of many concepts: what, how many, erased and kept."""
    rows = []
    for cell in cells:
        if cell.work not in ("many", "sequence") or (key := cell.key(setup)) not in store:
            continue
        result, _ = store.result(key)
        if cell.work == "many":
            stages = [{"forgotten": result["names"], "rows": result["rows"]}]
            what = "patches made apart, added"
        else:
            stages, what = result["stages"], f"one after another, first {cell.targets[0]}"
        rows += [
            {"method": cell.method, "what": what, "concepts": s["forgotten"], **_erased(s["rows"])}
            for s in stages
        ]
    return rows


def _erased(rows):
    gone = [not right for right in correct([r for r in rows if r["group"] == "target"], "concept")]
    kept = correct([r for r in rows if r["group"] != "target"], "concept")
    return {name: as_value(bootstrap(v), len(v)) for name, v in (("UA", gone), ("IRA", kept))}


def _grids(found):
    grids = []
    for (method, name), works in found.items():
        grid = (works.get("pictures") or {}).get("grid")
        if grid and method != UNTOUCHED:
            title = f"{name}, {method}"
            grids.append({"title": title, "columns": ["before", "after"], "rows": grid})
    return grids
