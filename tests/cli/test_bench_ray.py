"""Cells on a real Ray cluster of two machines (processes here), one of which is killed halfway."""

import os
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as LocalCluster

from fmn.bench.ray_cluster import Cluster
from fmn.bench.running.cells import Cell, Setup
from fmn.bench.running.runner import run_cells
from fmn.bench.running.store import Store
from fmn.errors import ForgetError

ROOT = Path(__file__).resolve().parents[2]
NUMBER = 12
# The lab of a worker that has no model: it notes which process did a cell, and takes a while.
LAB = """
import importlib.machinery, os, sys, time
from pathlib import Path


class Lab:
    def __init__(self, folder):
        self.folder = Path(folder)

    def run(self, cell, patches):
        start = self.folder / f"{cell.targets[0]}.{os.getpid()}.begun"
        start.touch()
        time.sleep(1.0)
        if cell.targets[0] == "refused":
            from fmn.errors import ForgetError
            raise ForgetError("no such thing")
        start.with_suffix(".done").touch()
        return {"target": cell.targets[0], "patches": len(patches)}, None, 0.1


class Finder:
    # Only when a task asks for it: Ray's own processes start without torch.
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fmn.bench.running.worker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            module.make_lab = lambda setup: Lab(setup.model)

        spec.loader.exec_module = patched
        return spec


sys.meta_path.insert(0, Finder)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of two cores each; their workers start with the stand-in for a lab."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(LAB, encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    made = LocalCluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20,
            "wait": False,
        },
    )  # fmt: skip
    second = made.add_node(num_cpus=2, object_store_memory=80 << 20, wait=False)
    made.wait_for_nodes(timeout=120)  # alone, each would have 30 seconds
    yield made, second
    made.shutdown()
    os.environ["PYTHONPATH"] = before or ""


def cells(names):
    return [Cell("pictures", "m", {}, (name,)) for name in names]


def make_setup(folder):
    return Setup(suite={}, model=str(folder), fingerprint="f", judge="none")


def test_a_machine_that_dies_loses_nothing(cluster, tmp_path):
    machines, second = cluster
    setup, names, seen = make_setup(tmp_path), [f"c{i}" for i in range(NUMBER)], []
    executor = Cluster(machines.address)
    assert executor.slots == 4

    def progress(step):
        seen.append(step.cell.targets[0])
        if len(seen) == 4:
            machines.remove_node(second, allow_graceful=False)

    with Store(tmp_path / "cells.sqlite") as store:
        try:
            assert run_cells(setup, cells(names), store, executor, progress) == []
        finally:
            executor.close()
        assert len(store) == NUMBER
        kept = {store.result(cell.key(setup))[0]["target"] for cell in cells(names)}
    assert kept == set(names)
    assert sorted(seen) == sorted(names), "a cell was lost, or counted twice"
    # What was going on over there may have been finished without a word, and is done again.
    finished = [path.name.split(".")[0] for path in tmp_path.glob("*.done")]
    assert set(finished) == set(names) and len(finished) <= NUMBER + 2
    assert [finished.count(name) for name in seen[:4]] == [1] * 4, "done again, though it was told"


def test_what_fails_there_is_told_here(cluster, tmp_path):
    executor = Cluster(cluster[0].address)
    with Store(tmp_path / "cells.sqlite") as store:
        try:
            failed = run_cells(make_setup(tmp_path), cells(["good", "refused"]), store, executor)
        finally:
            executor.close()
        assert len(store) == 1
    assert [(one.cell.targets[0], one.error) for one in failed] == [("refused", "no such thing")]


def test_no_cluster(monkeypatch):
    start = time.monotonic()
    with pytest.raises(ForgetError, match="no Ray cluster at 'nonsense'"):
        Cluster("nonsense")
    assert time.monotonic() - start < 60
    assert not ray.is_initialized()
