"""Is strength a knob that means something? A patch at several strengths, on the demo model.

    python benchmarks/strength.py reread

makes a patch for each target that settings may be chosen on, draws with it at each strength, and
lets the judge count, 8 pictures a question. In %: UA, IRA and CRA as in ConceptBench; unclear is
the share of the target's pictures in which the judge gives no thing, or no style, a probability of
one half. The last row is the untouched model, asked with the target's name left out of the prompt:
what "gone" looks like where nothing was edited.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.bench.measures.pictures import pictures
from fmn.bench.measures.trial import Trial
from fmn.bench.reporting.statistics import unlearn_canvas
from fmn.bench.suite import load_suite
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.methods import DEFAULT, forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler

STRENGTHS = 0.0, 0.2, 0.4, 0.59, 0.8, 1.0, 1.2, 1.5
COUNT = 8


def unclear(trial, asks):
    """Share of the pictures in which the judge is sure of nothing."""
    images = trial.draw(asks)
    sure = [trial.judge.probabilities(images, name).amax(1) for name in ("concept", "style")]
    return float((torch.stack(sure).amin(0) < 0.5).float().mean())


def main(preset):
    model, judge, suite = DiffusersModel.load("demo"), load_judge("demo"), load_suite("demo")
    targets, cache = [target for target in suite.targets if target.split == "tune"], {}
    settings = settings_of(preset, {})
    patches = [forget(model, [suite.concept(target)], settings) for target in targets]
    print("| strength | UA | IRA | CRA | unclear |\n|---:|---:|---:|---:|---:|")
    for strength in STRENGTHS:
        rows = []
        for target, patch in zip(targets, patches):
            applied = [(patch, strength)]
            with open_sampler(model, suite.sampling) as sampler, sampler.applying(applied):
                trial = Trial(suite, target, sampler, judge, count=COUNT, cache=cache)
                found = unlearn_canvas([(pictures(trial)["rows"], target.domain)], resamples=2)
                shares = [found[name]["value"] for name in ("UA", "IRA", "CRA")]
                rows.append([*shares, unclear(trial, trial.target_asks())])
        cells = " | ".join(f"{share:.0%}" for share in torch.tensor(rows).mean(0).tolist())
        print(f"| {strength} | {cells} |", flush=True)
    with open_sampler(model, suite.sampling) as sampler:
        shares = []
        for target in targets:
            trial = Trial(suite, target, sampler, judge, count=COUNT)
            asks = [
                replace(ask, prompt=" ".join(ask.prompt.replace(target.name, "").split()))
                for ask in trial.target_asks()
            ]
            shares.append(unclear(trial, asks))
    print(f"| name left out | | | | {sum(shares) / len(shares):.0%} |")


if __name__ == "__main__":
    main(*sys.argv[1:] or [DEFAULT])
