"""Do patches add up? Several concepts forgotten by one patch, and by patches made apart.

    python benchmarks/compose.py reread trce --sizes 3 5

takes the targets of the suite ``demo-wide``, in an order that a seed fixes, in groups of each size.
``one``: a patch for all of a group. ``apart``: a patch for each, applied together. ``joint``: these
merged by solving. ``single``: each patch by itself, on its own target. ``alone``: the harm of a
group's patches if they did not meet; a kept picture is right if it is with each of them.

UA, IRA and CRA are those of ConceptBench, in %, over pictures that two judges agree on; what a
group forgets is not asked for as kept. Options are chosen with ``--split tune`` and reported with
``--split report``.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.measures.pictures import kept_asks
from fmn.bench.measures.trial import Trial
from fmn.bench.reporting.statistics import unlearn_canvas
from fmn.bench.suite import SPLITS, load_suite
from fmn.errors import ForgetError
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import CachingModel
from fmn.jobs.joint_merge import joint_merge
from fmn.methods import DEFAULT, forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler

JUDGES = "said", "check"  # a row's labels by the first judge and by the second
HOW = "alone", "one", "apart", "joint"


class Bench:
    """Makes patches for groups of targets, and counts pictures with them applied."""

    def __init__(self, suite, count):
        self.suite, self.count, self.untouched = suite, count, {}
        self.model = CachingModel(DiffusersModel.load(suite.model))
        self.judges = load_judge(suite.judge), load_judge(suite.check)

    def train(self, targets, settings):
        return forget(self.model, [self.suite.concept(target) for target in targets], settings)

    def patches(self, how, group, apart, settings):
        """(patch, strength) of a group, from the patches made apart or anew."""
        if how == "one":
            return [(self.train(group, settings), 1.0)]
        applied = [(patch, 1.0) for patch in apart]
        return [(joint_merge(self.model, applied).patch, 1.0)] if how == "joint" else applied

    def judged(self, how, group, apart, settings):
        """``rows`` of a group, and the seconds that its patches took beside those made apart."""
        start = time.monotonic()
        if how == "alone":
            each = [self.rows([(patch, 1.0)], group) for patch in apart]
            return [all_right(*of_target) for of_target in zip(*each)], 0.0
        patches = self.patches(how, group, apart, settings)
        seconds = time.monotonic() - start
        return self.rows(patches, group), seconds

    def rows(self, patches, group):
        """(judged pictures, domain) of each target of a group."""
        found, forgotten = [], {target.name for target in group}
        with open_sampler(self.model, self.suite.sampling) as sampler, sampler.applying(patches):
            for target in group:
                trial = Trial(
                    self.suite, target, sampler, *self.judges, count=self.count,
                    cache=self.untouched,
                )  # fmt: skip
                others = forgotten - {target.name}
                asked = [
                    (name, ask)
                    for name, asks in ({"target": trial.target_asks()} | kept_asks(trial)).items()
                    for ask in asks
                    if not others & {ask.concept, ask.style}
                ]
                groups, asks = zip(*asked)
                rows = trial.rows(asks, trial.draw(asks), groups, trial.untouched(asks))
                found.append((rows, target.domain))
        return found


def all_right(*judged):
    """One target's rows by several patches: what one of them gets wrong is wrong.

    Its own pictures are gone if they are with one of them.
    """

    def worst(rows, judge, domain):
        labels = [row[judge][domain] for row in rows]
        return next((label for label in labels if label != rows[0][domain]), labels[0])

    merged = [
        row | {key: {name: worst(rows, key, name) for name in row[key]} for key in JUDGES}
        for rows in zip(*(rows for rows, _ in judged))
        for row in rows[:1]
    ]
    return merged, judged[0][1]


def groups_of(targets, size):
    """Whole groups of a size, in the targets' order."""
    return [targets[end - size : end] for end in range(size, len(targets) + 1, size)]


def show(method, how, groups, rows, seconds):
    shares = unlearn_canvas(rows)
    numbers = [f"{100 * shares[name]['value']:.1f}" for name in ("UA", "IRA", "CRA", "HM")]
    print(f"| {' | '.join([method, how, groups, *numbers, f'{seconds:.0f}'])} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="*", default=[DEFAULT])
    parser.add_argument("--sizes", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--how", nargs="+", choices=HOW, default=HOW)
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=4, help="a question")
    parser.add_argument("--seed", type=int, default=0, help="of the targets' order")
    options = parser.parse_args()
    suite = load_suite("demo-wide")
    targets = [target for target in suite.targets if target.split == options.split]
    random.Random(options.seed).shuffle(targets)
    bench = Bench(suite, options.pictures)
    print("| method | patches | groups | UA | IRA | CRA | mean | seconds to make them |")
    print("|---|---|---:|" + "---:|" * 5)
    for method in options.method:
        settings = settings_of(method, {})
        start = time.monotonic()
        alone = {target.name: bench.train([target], settings) for target in targets}
        each = (time.monotonic() - start) / len(targets)
        rows = [bench.rows([(alone[t.name], 1.0)], [t])[0] for t in targets]
        show(method, "single", f"{len(targets)} of 1", rows, each)
        for size in options.sizes:
            groups = groups_of(targets, size)
            for how in options.how:
                rows, seconds = [], 0.0
                try:
                    for group in groups:
                        apart = [alone[target.name] for target in group]
                        more, took = bench.judged(how, group, apart, settings)
                        rows, seconds = rows + more, seconds + took
                except ForgetError as error:
                    print(f"{method}, {how}: {error}", file=sys.stderr)
                    continue
                seconds = seconds / len(groups) + (0.0 if how == "one" else each * size)
                show(method, how, f"{len(groups)} of {size}", rows, seconds)


if __name__ == "__main__":
    main()
