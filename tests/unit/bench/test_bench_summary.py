"""Columns and summary from results written by hand, with exact values."""

import json

import pytest

from fmn.bench.names import SCALE
from fmn.bench.reporting.columns import COLUMNS, Results
from fmn.bench.reporting.report import write_report
from fmn.bench.reporting.summary import summarise
from fmn.bench.running.cells import Cell, CellProgress, Method, plan
from fmn.bench.running.store import Store
from fmn.bench.suite import parse_suite

from ..worlds import data, make_setup

SUITE = parse_suite(data(), "little")
DOG, LIGHT = SUITE.targets


def row(group, concept, style, said_concept, said_style, **more):
    said = {"concept": said_concept, "style": said_style}
    return {"group": group, "concept": concept, "style": style, "seed": 1, "said": said} | more


DOG_ROWS = [
    row("target", "dog", "dark", "dog", "dark", coherence=0.5, distance=0.9),
    row("target", "dog", "light", "cat", "dark", coherence=1.0, distance=0.9),
    row("near", "cat", "dark", "cat", "dark", distance=0.1),
    row("near", "cat", "light", "dog", "light", distance=0.3),
    row("far", "tree", "dark", "tree", "light", distance=0.0),
    row("far", "tree", "light", "tree", "light", distance=0.0),
]
LIGHT_ROWS = [
    row("target", "tree", "light", "tree", "dark"),
    row("near", "tree", "dark", "cat", "dark"),
]


def values(*results):
    return {key: value["value"] for key, value in made(*results).items()}


def made(*results):
    """Key of a column -> value, of columns that were measured."""
    found = {column["key"]: compute(Results(results)) for column, compute in COLUMNS}
    return {key: value for key, value in found.items() if value is not None}


def test_columns_of_one_target():
    result = {"rows": DOG_ROWS, "kid": 0.25, "seconds_a_picture": 2.0}
    train = {"seconds": 3.0, "peak_bytes": 5_000_000, "bytes": 40_000}
    found = values((DOG, {"pictures": result, "train": train}))
    assert found == {
        "UA": 0.5, "IRA": 0.75, "CRA": 0.75, "HM": pytest.approx(3 / (2 + 4 / 3 + 4 / 3)),
        "kept": 0.75,
        "coherence": 0.75, "companion": 0.5, "distance": pytest.approx(0.1), "KID": 0.25,
        "near": 0.5, "seconds": 3.0, "peak": 5.0, "size": 0.04, "per_picture": 2.0,
    }  # fmt: skip


def test_targets_of_both_domains_are_pooled_each_by_its_own():
    found = values(
        (DOG, {"pictures": {"rows": DOG_ROWS}}), (LIGHT, {"pictures": {"rows": LIGHT_ROWS}})
    )
    assert found["UA"] == pytest.approx(2 / 3)  # two of three: one dog, and the light
    assert found["IRA"] == pytest.approx(4 / 5)  # things of the dog, styles of the light
    assert found["CRA"] == pytest.approx(3 / 5)


def test_columns_and_means_over_targets_pair_ira_and_cra():
    """Each target keeps one picture, right in one domain only: see ``unlearn_canvas``'s test."""
    gone = row("target", "dog", "dark", "cat", "dark")
    inside = row("near", "cat", "dark", "cat", "light")
    across = row("far", "tree", "dark", "cat", "dark")
    found = made(
        (DOG, {"pictures": {"rows": [gone, inside]}}), (DOG, {"pictures": {"rows": [gone, across]}})
    )
    for key, expected in (("HM", (0.6, 0, 0.6)), ("kept", (0.5, 0.5, 0.5))):
        ends = found[key]["value"], found[key]["low"], found[key]["high"]
        assert ends == pytest.approx(expected)


def test_probes_count_only_what_the_untouched_model_draws():
    rows = [
        {"probe": "short", "still": True, "untouched": True},
        {"probe": "short", "still": False, "untouched": True},
        {"probe": "short", "still": True, "untouched": False},
        {"probe": "aliases", "still": False, "untouched": True},
    ]
    shares = [{"share": share, "still": share == 0.4, "untouched": True} for share in (0.2, 0.4)]
    controls = [{"still": True}, {"still": False}]
    relearn = {"rows": [{"still": True, "untouched": True}], "controls": controls}
    together = {"rows": [{"kept": True, "untouched_kept": True}, {"kept": 0, "untouched_kept": 0}]}
    found = values(
        (DOG, {"rungs": {"rows": rows}, "completion": {"rows": shares}, "relearn": relearn,
               "together": together, "mscore": {"scores": [0.2, 0.4]},
               "pictures": {"rows": DOG_ROWS}})
    )  # fmt: skip
    assert found["short"] == 0.5 and found["aliases"] == 0
    assert found["completion"] == 0 and found["relearn"] == 1 and found["control"] == 0.5
    assert found["together"] == 1 and found["mscore"] == pytest.approx(0.3)
    # efficacy 1/2, specificity 3/4, generality: the alias is gone, so 1
    assert found["Ho"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1))
    absent = {"rows": [], "controls": "absent"}
    assert not {"relearn", "control"} & set(values((DOG, {"relearn": absent})))


def test_an_inversion_stands_beside_its_floor_and_its_control():
    rows = [
        {"still": True, "untouched": True, "nothing": True},
        {"still": True, "untouched": True, "nothing": False},
        {"still": True, "untouched": False, "nothing": True},  # the model did not know it
    ]
    of_dog = {"rows": rows, "control": [{"still": False}] * 3}
    of_light = {"rows": rows[:1], "control": "absent"}
    found = values((DOG, {"inversion": of_dog}), (LIGHT, {"inversion": of_light}))
    assert found["inversion"] == 1 and found["nothing"] == pytest.approx(2 / 3)
    assert found["invented"] == 0
    assert "invented" not in values((LIGHT, {"inversion": of_light}))


@pytest.fixture
def filled(tmp_path):
    setup = make_setup()
    method = Method("m", {"preset": "resteer"})
    cells = plan(setup, SUITE, ["dog", "light"], [method], ("pictures",), SCALE)
    grid = [{"label": "a dog", "pictures": ["x", "y"]}]
    with Store(tmp_path / "cells.sqlite") as store:
        for cell in cells:
            rows = DOG_ROWS if cell.targets[0] != "light" else LIGHT_ROWS
            result = {"rows": rows, "grid": grid, "agreement": {"concept": 0.5, "style": 1.0}}
            if cell.work == "train":
                result = {"seconds": 1.0, "bytes": 10}
            if cell.work == "many":
                result = {"names": len(cell.targets), "rows": DOG_ROWS}
            if cell.work == "sequence":
                result = {"names": [], "stages": [{"forgotten": 2, "rows": DOG_ROWS}]}
            store.add(cell.key(setup), {}, result, b"", 1.0)
        yield setup, cells, store


def test_a_summary(filled):
    setup, cells, store = filled
    untouched = next(cell for cell in cells if cell.work == "pictures")
    missed = [one | {"before": [{"concept": "cat", "style": "dark"}]} for one in DOG_ROWS[:1]]
    result = {"rows": missed + DOG_ROWS[1:], "agreement": {"concept": 0.5, "style": 1.0}}
    store.add(untouched.key(setup), {}, result, b"", 1.0)
    broken = CellProgress(0, 1, Cell("rungs", "m", {}, ("dog",)), None, "Traceback\nValueError: no")
    found = summarise(setup, SUITE, cells, store, "the command", [broken])
    assert found["suite"] == "Little world" and found["command"] == "the command"
    assert [(r["target"], r["method"]) for r in found["rows"]] == [
        ("dog", "untouched"), ("light", "untouched"), ("dog", "m"), ("light", "m"),
    ]  # fmt: skip
    assert [(m["kind"], m["targets"]) for m in found["means"] if m["method"] == "m"] == [
        ("object", ["dog"]), ("style", ["light"]), ("all", ["dog", "light"]),
    ]  # fmt: skip
    assert {"UA", "IRA", "seconds"} <= {column["key"] for column in found["columns"]}
    assert json.loads(json.dumps(found["columns"])) == found["columns"]
    assert [(s["what"], s["concepts"], s["UA"]["value"]) for s in found["scale"]] == [
        ("patches trained alone, added", 1, 0.5),
        ("one after another, first old man", 2, 0.5),
        ("one after another, first dog", 2, 0.5),
    ]
    assert [grid["title"] for grid in found["grids"]] == ["dog, m", "light, m"]
    notes = " ".join(found["notes"])
    assert "'dog' in only 50%" in notes and "agrees on 75.0% of all labels" in notes
    assert "Not measured: rungs of m on dog: ValueError: no" in notes


def test_a_summary_can_be_reported(filled, tmp_path):
    setup, cells, store = filled
    paths = write_report(summarise(setup, SUITE, cells, store), tmp_path)
    text = paths["html"].read_text(encoding="utf-8")
    assert "patches trained alone, added" in text and "one after another, first" in text


def test_cells_that_are_missing_are_left_out(filled):
    setup, cells, store = filled
    store.db.execute("DELETE FROM cells WHERE key = ?", (cells[1].key(setup),))
    found = summarise(setup, SUITE, cells, store)
    assert ("light", "untouched") not in [(r["target"], r["method"]) for r in found["rows"]]
