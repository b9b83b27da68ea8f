"""A batch of patches: how long it takes, and what becomes of them when they are merged.

    python benchmarks/batch.py uce --count 100 --time-only
    python benchmarks/batch.py uce --count 20 --budgets 60

forgets the first N of the demo model's 120 things, each in a patch of its own, in the order of
``many.py``. Times: one by one, as a batch, and the batch again. Then, in %: of the forgotten
things' pictures, those that no longer show them (UA); of the pictures of 20 other things, those
with the right thing, and with the right style; by merged patch.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from many import KEPT, measure

from fmn.bench.suite import load_suite
from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import forget_each
from fmn.jobs.joint_merge import joint_merge
from fmn.methods import DEFAULT, forget, settings_of
from fmn.metrics.load import load_judge
from fmn.patches.merge import merge_patches
from fmn.patches.patch import file_size

ALONE = 5  # concepts made one by one, for the time


def timed(work):
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", default=DEFAULT)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--budgets", nargs="*", type=float, default=[], help="kB")
    parser.add_argument("--time-only", action="store_true")
    options = parser.parse_args()
    model, suite, settings = (
        DiffusersModel.load("demo"),
        load_suite("demo"),
        settings_of(options.method, {}),
    )
    names = list(suite.kinds)
    random.Random(0).shuffle(names)
    gone, stay = names[: options.count], names[-KEPT:]
    concepts = [Concept(name, suite.kinds[name]) for name in gone]
    _, alone = timed(lambda: [forget(model, [each], settings) for each in concepts[:ALONE]])
    print(f"one by one: {alone / min(ALONE, len(concepts)):.2f} s a concept")
    with tempfile.TemporaryDirectory() as folder:
        for what in ("as a batch", "again"):
            batch, seconds = timed(lambda: forget_each(model, concepts, settings, folder))
            print(f"{what}: {seconds / len(concepts):.3f} s a concept, {seconds:.1f} s in all")
        print(batch.report())
        if not options.time_only:
            sources = [(path, 1.0) for path in batch.files]
            show(model, suite, gone, stay, options, sources)


def show(model, suite, gone, stay, options, sources):
    """A table of merged patches."""
    judge = load_judge("demo")
    print("| merged | UA | kept things | kept styles | kB | cut off | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")

    def row(what, merged=None, seconds=0.0):
        patches = [merged.patch] if merged else []
        shares = [f"{share:.0%}" for share in measure(model, judge, suite, patches, gone, stay)]
        size = f"{file_size(merged.patch) / 1000:.0f} | {merged.error:.0%}" if merged else " | "
        print(f"| {what} | {' | '.join(shares)} | {size} | {seconds:.1f} |", flush=True)

    row("untouched")
    for kilobytes in (0, *options.budgets):
        bound = int(kilobytes * 1000)
        what = f", {kilobytes:g} kB" if kilobytes else ""
        row(f"concatenate{what}", *timed(lambda bound=bound: merge_patches(sources, bound)))
        row(f"joint{what}", *timed(lambda bound=bound: joint_merge(model, sources, budget=bound)))


if __name__ == "__main__":
    main()
