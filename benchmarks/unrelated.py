"""How easily a model's pictures change: what patches of unrelated concepts cost kept pictures.

    python benchmarks/unrelated.py demo-dit
    python benchmarks/unrelated.py demo

For targets for choosing of the suite demo-wide, the pictures that have to stay right are drawn with
the patch of an identity that occurs in none of their prompts: 100 % would be a model that only what
was forgotten changes. IRA and CRA as ``fmn bench`` has them, in per cent.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.measures.pictures import pictures
from fmn.bench.measures.trial import Trial
from fmn.bench.reporting.columns import Results
from fmn.bench.suite import load_suite
from fmn.concepts.concept import Concept
from fmn.hosts.diffusers.open import open_model
from fmn.methods import forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler

TARGETS = (
    "santa claus", "robot", "clown", "dog", "apple", "bicycle", "neon sign", "ink drawing",
)  # fmt: skip
PATCHES = 3
COUNT = 4  # pictures a question


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["demo", "demo-dit"])
    parser.add_argument("--method", nargs="+", default=["reread", "uce"])
    options = parser.parse_args()
    suite, model = load_suite("demo-wide"), open_model(options.model)
    judge, check = load_judge(suite.judge), load_judge(suite.check)
    targets = [suite.find(name) for name in TARGETS]
    used = {*suite.far, *TARGETS, *(name for target in targets for name in target.near)}
    names = [name for name in suite.concepts if name not in used][:PATCHES]
    cache: dict = {}
    print(
        f"{options.model}; patches of {', '.join(names)}\n\n| method | IRA | CRA |\n|---|---:|---:|"
    )
    for method in options.method:
        settings = settings_of(method, {})
        patches = [forget(model, [Concept(name, suite.kinds[name])], settings) for name in names]
        found = []
        for i, target in enumerate(targets):
            with open_sampler(model, suite.sampling) as sampler:
                trial = Trial(suite, target, sampler, judge, check, count=COUNT, cache=cache)
                with sampler.applying([(patches[i % PATCHES], 1.0)]):
                    found.append((target, {"pictures": pictures(trial)}))
        shares = Results(found).accuracies
        ira, cra = (f"{100 * shares[key]['value']:.1f}" for key in ("IRA", "CRA"))
        print(f"| {method} | {ira} | {cra} |", flush=True)


if __name__ == "__main__":
    main()
