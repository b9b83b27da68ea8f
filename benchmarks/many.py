"""Many concepts at once: one patch for all of them, and patches made apart and applied together.

    python benchmarks/many.py reread --counts 1 5 20 50 100

forgets the first N of the demo model's 120 things, in an order that a seed fixes; the last 20 are
never forgotten. In %: of forgotten things' pictures, those that no longer show them (UA); of the
other 20 things' pictures, those with the right thing, and with the right style. ``named``: these 20
and the styles are given as what is to be kept; else only the shipped lists speak for them.
``joint``: patches made apart are merged by solving for them jointly; else all are applied together.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.measures.trial import Trial
from fmn.bench.suite import Target, load_suite
from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import CachingModel
from fmn.jobs.joint_merge import joint_merge
from fmn.methods import DEFAULT, forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler

HOW = "one patch", "one patch, named", "apart", "apart, joint, named"
KEPT, GONE_PICTURES, KEPT_PICTURES = 20, 60, 80


def measure(model, judge, suite, patches, gone, stay):
    """UA, and shares of kept pictures with the right thing and the right style."""
    with open_sampler(model, suite.sampling) as sampler:
        trial = Trial(suite, Target(gone[0], suite.kinds[gone[0]]), sampler, judge)
        asks = trial.pairs(gone, list(suite.styles), GONE_PICTURES)
        others = trial.pairs(stay, list(suite.styles), KEPT_PICTURES)
        with sampler.applying([(patch, 1.0) for patch in patches]):
            labels, kept = (trial.labels(trial.draw(each)) for each in (asks, others))
    erased = sum(label != ask.concept for label, ask in zip(labels["concept"], asks)) / len(asks)
    right = [
        sum(label == getattr(ask, name) for label, ask in zip(kept[name], others)) / len(others)
        for name in ("concept", "style")
    ]
    return [erased, *right]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="*", default=[DEFAULT])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 5, 20, 50, 100])
    parser.add_argument("--how", nargs="+", default=HOW)
    options = parser.parse_args()
    model, judge, suite = DiffusersModel.load("demo"), load_judge("demo"), load_suite("demo")
    names = list(suite.kinds)
    random.Random(0).shuffle(names)
    stay = names[-KEPT:]
    print("| method | concepts | patches | UA | kept things | kept styles | seconds | rank |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")

    def row(method, count, how, patches, seconds):
        shares = measure(model, judge, suite, patches, names[: count or 1], stay)
        cells = " | ".join(f"{share:.0%}" for share in shares)
        rank = max((max(patch.ranks) for patch in patches), default=0)
        print(f"| {method} | {count} | {how} | {cells} | {seconds:.0f} | {rank} |", flush=True)

    row("untouched", 0, "", [], 0)
    for method in options.method:
        settings = settings_of(method, {})
        for count in options.counts:
            concepts = [Concept(name, suite.kinds[name]) for name in names[:count]]
            for how in options.how:
                start = time.perf_counter()
                keep = [suite.concepts[name] for name in stay] + list(suite.styles)
                keep = keep if "named" in how else ()
                if "apart" in how:
                    memo = CachingModel(model)
                    patches = [forget(memo, [each], settings, keep=keep) for each in concepts]
                else:
                    patches = [forget(model, concepts, settings, keep=keep)]
                if "joint" in how:
                    patches = [
                        joint_merge(model, [(each, 1.0) for each in patches], keep=keep).patch
                    ]
                row(method, count, how, patches, time.perf_counter() - start)


if __name__ == "__main__":
    main()
