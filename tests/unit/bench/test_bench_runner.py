"""The store and the runner: what is done, in which order, what is kept when something fails."""

import json
import sqlite3
from concurrent.futures import Future
from dataclasses import asdict

import pytest
import torch

from fmn.bench.running.cells import Cell, Method, plan
from fmn.bench.running.runner import run_cells, store_patches
from fmn.bench.running.store import Store
from fmn.bench.suite import parse_suite
from fmn.errors import ForgetError
from fmn.jobs.executors import Here

from ..worlds import data, make_setup

SUITE = parse_suite(data(), "little")
SETUP = make_setup()


class Recorder:
    """A lab that writes down what it was asked; ``fails`` maps (work, target) to an exception."""

    def __init__(self, fails=None):
        self.asked, self.fails = [], fails or {}

    def run(self, cell, patches):
        self.asked.append((cell.work, cell.method, cell.targets[0], patches))
        if error := self.fails.get((cell.work, cell.targets[0])):
            raise error
        made = f"patch {cell.targets[0]}".encode() if cell.work == "train" else None
        return {"rows": [cell.targets[0]]}, made, 0.5


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "cells.sqlite") as opened:
        yield opened


def cells(methods=(Method("m", {"preset": "resteer"}),), measures=("pictures",)):
    return plan(SETUP, SUITE, ["dog", "light"], methods, measures)


def test_every_cell_is_done_once_with_the_patch_it_needs(store):
    lab, seen = Recorder(), []
    assert run_cells(SETUP, cells(), store, Here(), seen.append, lab) == []
    assert [asked[:3] for asked in lab.asked] == [
        ("pictures", "untouched", "dog"),
        ("pictures", "untouched", "light"),
        ("train", "m", "dog"),
        ("pictures", "m", "dog"),
        ("train", "m", "light"),
        ("pictures", "m", "light"),
    ]
    assert [asked[3] for asked in lab.asked][3::2] == [[b"patch dog"], [b"patch light"]]
    assert [(progress.done, progress.total) for progress in seen] == [(i, 6) for i in range(1, 7)]
    key = cells()[0].key(SETUP)
    assert store.result(key) == ({"rows": ["dog"]}, 0.5) and len(store) == 6


def test_a_run_goes_on_where_it_stopped(store):
    class Cancel(Exception):
        pass

    def cancel(progress):
        if progress.done == 3:
            raise Cancel

    first, second = Recorder(), Recorder()
    with pytest.raises(Cancel):
        run_cells(SETUP, cells(), store, Here(), cancel, first)
    seen = []
    run_cells(SETUP, cells(), store, Here(), seen.append, second)
    assert len(first.asked) == len(second.asked) == 3
    assert not {a[:3] for a in first.asked} & {a[:3] for a in second.asked}
    assert [progress.done for progress in seen] == [4, 5, 6]


def test_a_cancel_in_the_middle_of_a_cell_ends_the_run(store):
    class Cancel(Exception):
        pass

    lab = Recorder({("train", "dog"): Cancel()})
    with pytest.raises(Cancel):
        run_cells(SETUP, cells(), store, Here((Cancel,)), lab=lab)
    assert len(store) == 2


def test_what_fails_is_told_and_the_rest_is_done(store):
    lab = Recorder(
        {("train", "dog"): ForgetError("no such dog"), ("pictures", "light"): ValueError("bug")}
    )
    failed = run_cells(SETUP, cells(), store, Here(), lab=lab)
    told = {(p.cell.work, p.cell.method, p.cell.targets[0]): p.error for p in failed}
    assert told["train", "m", "dog"] == "no such dog"
    assert "Traceback" in told["pictures", "untouched", "light"]
    # What needed the dog's patch was not tried; everything else was.
    assert ("pictures", "m", "dog") not in [asked[:3] for asked in lab.asked]
    assert len(store) == 2
    lab.fails.clear()
    assert run_cells(SETUP, cells(), store, Here(), lab=lab) == [] and len(store) == 6


class Elsewhere(Here):
    """An executor that gives every error to the run, as processes of their own do."""

    def submit(self, function, *arguments):
        try:
            return super().submit(function, *arguments)
        except RuntimeError as error:
            future = Future()
            future.set_exception(error)
            return future


def test_memory_that_runs_out_here_ends_the_run(store):
    """ComfyUI is to see the error, as it then unloads models; what is finished stays."""
    lab = Recorder({("train", "dog"): torch.OutOfMemoryError("CUDA out of memory.")})
    with pytest.raises(torch.OutOfMemoryError):
        run_cells(SETUP, cells(), store, Here(), lab=lab)
    assert len(store) == 2
    lab.fails.clear()
    assert run_cells(SETUP, cells(), store, Here(), lab=lab) == [] and len(store) == 6


def test_memory_that_runs_out_in_a_worker_fails_one_cell(store):
    lab = Recorder({("pictures", "light"): torch.OutOfMemoryError("CUDA out of memory.")})
    failed = run_cells(SETUP, cells(), store, Elsewhere(), lab=lab)
    assert {progress.cell.work for progress in failed} == {"pictures"} and len(failed) == 2
    assert all("memory ran out" in progress.error for progress in failed)
    assert "Traceback" not in failed[0].error and len(store) == 4


def test_patches_that_exist_are_not_trained(store):
    patch = Method("mine", {"sha256": "s"}, b"bytes")
    lab, planned = Recorder(), cells([patch])
    store_patches(SETUP, planned, store, [patch])
    run_cells(SETUP, planned, store, Here(), lab=lab)
    assert [asked for asked in lab.asked if asked[1] == "mine"] == [
        ("pictures", "mine", "dog", [b"bytes"]),
        ("pictures", "mine", "light", [b"bytes"]),
    ]


def test_a_result_that_is_no_number_is_refused(store):
    class Lab(Recorder):
        def run(self, cell, patches):
            return {"rows": float("nan")}, None, 0.0

    with pytest.raises(ValueError, match="JSON"):
        run_cells(SETUP, cells()[:1], store, Here(), lab=Lab())
    assert len(store) == 0


def test_a_store_keeps_whole_rows(tmp_path):
    path, cell = tmp_path / "deep" / "cells.sqlite", Cell("train", "m", {}, ("dog",))
    with Store(path) as store:
        store.add("k", asdict(cell), {"a": 1}, b"patch", 1.5)
    with Store(path) as store:
        assert "k" in store and "other" not in store
        assert store.result("k") == ({"a": 1}, 1.5) and store.patch("k") == b"patch"
    kept = sqlite3.connect(path).execute("SELECT cell FROM cells").fetchone()[0]
    assert json.loads(kept)["targets"] == ["dog"]


def test_a_file_that_is_no_store(tmp_path):
    path = tmp_path / "cells.sqlite"
    path.write_bytes(b"not a database at all, and long enough to tell" * 30)
    with pytest.raises(ForgetError, match="cannot be used as the bench's store"):
        Store(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForgetError, match="cannot be used"):
        Store(tmp_path / "file" / "cells.sqlite")
