"""Is a concept gone in every style? UA of the reported targets of demo-wide, style by style.

    python benchmarks/by_style.py
    python benchmarks/by_style.py --model demo-dit --method reread uce

With 4 pictures a question ``fmn bench`` asks for the first four of the suite's eight styles; this
draws one picture of each target, but for styles, in each of the eight. Counted are pictures in
which both judges saw the target before, and gone is what neither sees after.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor

from fmn.bench.measures.trial import Trial
from fmn.bench.suite import load_suite
from fmn.hosts.diffusers.open import open_model
from fmn.methods import forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["demo", "demo-dit"], default="demo")
    parser.add_argument("--method", nargs="+", default=["reread", "trce"])
    options = parser.parse_args()
    suite, model = load_suite("demo-wide"), open_model(options.model)
    judges = load_judge(suite.judge), load_judge(suite.check)
    asked: Counter[str] = Counter()
    gone: Counter[tuple[str, str]] = Counter()
    for target in suite.targets:
        if target.domain == "style" or target.split != "report":
            continue
        with open_sampler(model, suite.sampling) as sampler:
            trial = Trial(suite, target, sampler, *judges, count=len(suite.styles))
            asks = trial.target_asks()
            before = shown(trial, trial.draw(asks))
        known = [ask for ask, labels in zip(asks, before) if labels == {target.name}]
        asked.update(ask.style for ask in known)
        for method in options.method:
            patch = forget(model, [suite.concept(target)], settings_of(method, {}))
            with open_sampler(model, suite.sampling) as sampler, sampler.applying([(patch, 1.0)]):
                trial = Trial(suite, target, sampler, *judges)
                after = shown(trial, trial.draw(known))
            for ask, labels in zip(known, after):
                gone[method, ask.style] += target.name not in labels
        print(f"{target.name}: {len(known)} pictures", file=sys.stderr)
    print("| method | " + " | ".join(suite.styles) + " | first four | others |")
    print("|---|" + "---:|" * (len(suite.styles) + 2))
    styles = list(suite.styles)
    parts = [*([style] for style in styles), styles[:4], styles[4:]]
    for method in options.method:
        shares = [
            sum(gone[method, style] for style in part) / sum(asked[style] for style in part)
            for part in parts
        ]
        print(f"| {method} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |")
    print(f"\npictures: {', '.join(f'{style} {asked[style]}' for style in suite.styles)}")


def shown(trial: Trial, images: Tensor) -> list[set[str]]:
    """What the judges see in each picture."""
    seen = [trial.labels(images, judge)["concept"] for judge in (trial.judge, trial.check)]
    return [set(labels) for labels in zip(*seen)]


if __name__ == "__main__":
    main()
