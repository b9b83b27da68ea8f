"""How long many patches take on many machines: measured here, and computed from that.

    python benchmarks/fleet.py uce reread --count 24

forgets the demo model's first N things, a patch each: in this process, in two worker processes, and
on a Ray cluster of two machines of one core each (on this computer). Prints the seconds until the
first patch, which are mostly imports and loading the model, and those of each patch of the second
half. Then what a patch costs the one process that hands out tasks and writes files. From these it
computes how long more names take on more such machines of one core.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.suite import load_suite
from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import Source, forget_each
from fmn.jobs.executors import Cluster, Processes, Task, run_tasks
from fmn.methods import settings_of

MACHINES, NAMES = (1, 8, 64), (100, 1000, 10_000)
MANY = 300  # tasks, for what each costs the process that hands them out


class Given:
    """An executor whose tasks are done at once, with the same result."""

    slots = 1

    def __init__(self, result):
        self.result = result

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(self.result)
        return future


def timed_batch(model, concepts, settings, workers=None):
    """(seconds until the first patch, seconds of each in the second half, the last file's content).

    By then all workers have loaded the model and encoded what they keep.
    """
    start, ends = time.perf_counter(), []

    def progress(event):
        if event.step and event.step.index == event.step.total:
            ends.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        batch = forget_each(model, concepts, settings, folder, progress, workers=workers)
        assert len(batch.files) == len(concepts) == len(ends), batch.report()
        content = batch.files[-1].read_bytes()
    half = len(ends) // 2
    return ends[0], (ends[-1] - ends[half - 1]) / (len(ends) - half), content


def hand_out(executor):
    """Seconds of a task that does nothing."""
    todo = list(range(MANY))
    tasks = run_tasks(executor, lambda: Task(0, str, (todo.pop(),)) if todo else None)
    next(tasks)
    start = time.perf_counter()
    return sum(1 for _ in tasks) and (time.perf_counter() - start) / (MANY - 1)


def local_cluster():
    """Two Ray machines of one core."""
    from ray.cluster_utils import Cluster as LocalCluster

    os.environ["PYTHONPATH"] = sys.path[0]
    size = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = LocalCluster(initialize_head=True, head_node_args={"include_dashboard": False} | size)
    made.add_node(**size)
    return made


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=["uce", "reread"])
    parser.add_argument("--count", type=int, default=24, help="at most 120")
    options = parser.parse_args()
    model = DiffusersModel.load("demo")
    source = Source("demo", model.fingerprint())
    kinds = list(load_suite("demo").kinds.items())[: options.count]
    concepts = [Concept(name, kind) for name, kind in kinds]
    cluster, measured = local_cluster(), {}
    print("| method | where | first patch (s) | a patch later (s) |\n|---|---|---:|---:|")
    for method in options.methods:
        settings = settings_of(method, {})

        def show(where, executor=None, method=method, settings=settings):
            workers = (executor, source) if executor else None
            first, each, content = timed_batch(model, concepts, settings, workers)
            print(f"| {method} | {where} | {first:.1f} | {each:.3f} |", flush=True)
            return first, each, content

        show("this process")
        with closing(Processes(2)) as executor:
            show("2 processes", executor)
        with closing(Cluster(cluster.address, 1)) as executor:
            measured[method] = show("Ray, 2 machines of a core", executor)
            task = hand_out(executor)
    cluster.shutdown()
    compute(model, source, measured, task)


def compute(model, source, measured, task):
    """Print what the measured seconds imply."""
    names = [Concept(f"thing {number}") for number in range(MANY)]
    print(f"\na task that does nothing, by Ray: {1000 * task:.1f} ms")
    print(f"\n| computed | machines | {' | '.join(f'{n:,} names' for n in NAMES)} |")
    print("|---|---:|" + "---:|" * len(NAMES))
    for method, (first, each, content) in measured.items():
        workers = Given(content), source
        write = timed_batch(model, names, settings_of(method, {}), workers)[1]
        here = write + task
        for machines in MACHINES:
            # Both machines of the measured cluster worked at the same time.
            seconds = [first + max(math.ceil(n / machines) * 2 * each, n * here) for n in NAMES]
            row = " | ".join(f"{each:,.0f} s" for each in seconds)
            print(f"| {method}, {1000 * here:.1f} ms a patch here | {machines} | {row} |")


if __name__ == "__main__":
    main()
