"""Cells and patches on a real Ray cluster of two machines (processes here), one of which is killed
halfway."""

import os
import signal
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as LocalCluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fmn.bench.running.cells import Cell, Setup
from fmn.bench.running.runner import run_cells
from fmn.bench.running.store import Store
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import Source, forget_each
from fmn.jobs.executors import Cluster

from .test_batch_workers import CONCEPTS, QUICK, assert_same_patches

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
        if name != "fmn.bench.running.lab":
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
    """Nodes of two cores; their workers start with the stand-in for a lab."""
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
    yield made
    made.shutdown()
    os.environ["PYTHONPATH"] = before or ""


@pytest.fixture
def second(cluster):
    """A machine beside the head, for a test that kills it."""
    added = cluster.add_node(num_cpus=2, object_store_memory=80 << 20, wait=False)
    cluster.wait_for_nodes(timeout=120)  # alone, each would have 30 seconds
    return added


def cells(names):
    return [Cell("pictures", "m", {}, (name,)) for name in names]


def make_setup(folder):
    return Setup(suite={}, model=str(folder), fingerprint="f", judge="none")


def test_a_machine_that_dies_loses_nothing(cluster, second, tmp_path):
    setup, names, seen = make_setup(tmp_path), [f"c{i}" for i in range(NUMBER)], []
    executor = Cluster(cluster.address)
    assert executor.slots == 4

    def progress(step):
        seen.append(step.cell.targets[0])
        if len(seen) == 4:
            cluster.remove_node(second, allow_graceful=False)

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
    before = signal.getsignal(signal.SIGTERM)
    executor = Cluster(cluster.address)
    assert signal.getsignal(signal.SIGTERM) == before  # with which the command line cancels
    with Store(tmp_path / "cells.sqlite") as store:
        try:
            failed = run_cells(make_setup(tmp_path), cells(["good", "refused"]), store, executor)
        finally:
            executor.close()
        assert len(store) == 1
    assert [(one.cell.targets[0], one.error) for one in failed] == [("refused", "no such thing")]


def works(machine):
    """Whether one of its processes is at a task."""
    (raylet,) = machine.all_processes["raylet"]
    for child in psutil.Process(raylet.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_with_threads" in " ".join(child.cmdline()):
                return True
    return False


def test_a_patch_whose_machine_dies_is_made_by_another(cluster, second, tmp_path):
    """The head is busy until then, so that the second machine is in the middle of one."""
    model, done = DiffusersModel.load("demo"), []
    executor = Cluster(cluster.address, workers=1)
    assert (executor.slots, executor.threads) == (2, 2)
    on_head = NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)
    busy = ray.remote(num_cpus=2)(lambda: time.sleep(600))
    busy = busy.options(scheduling_strategy=on_head).remote()

    def progress(step):
        done.append(step.done)
        if len(done) == 2:
            while not works(second):
                time.sleep(0.01)
            cluster.remove_node(second, allow_graceful=False)
            ray.cancel(busy, force=True)

    workers = executor, Source("demo", model.fingerprint())
    with closing(executor):
        batch = forget_each(model, CONCEPTS, QUICK, tmp_path / "a", progress, workers=workers)
    assert len(cluster.list_all_nodes()) == 1 and done == [1, 2, 3, 4, 5, 6]
    assert batch.failed == batch.existing == []
    assert sorted((tmp_path / "a").iterdir()) == sorted(batch.files), "an unfinished file"
    assert_same_patches(model, batch.files, tmp_path / "b")


def test_no_cluster(monkeypatch):
    start = time.monotonic()
    with pytest.raises(ForgetError, match="no Ray cluster at 'nonsense'"):
        Cluster("nonsense")
    assert time.monotonic() - start < 60
    assert not ray.is_initialized()
