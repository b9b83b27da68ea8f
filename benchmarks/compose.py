"""Do patches add up? Three concepts forgotten by patches made apart, and by one patch for all.

    python benchmarks/compose.py double-projections trce uce oce-projection

draws the prompts of the demo job with the demo model and lets its judge count. Rows of one run have
equal noise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.demo import CONCEPTS, FORGOTTEN, GUIDANCE, KEPT, PROMPTS, SIDE, STEPS, judge_labels
from fmn.methods import DEFAULT, forget, settings_of
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling


def count(model, judge, patches):
    """Pictures of each concept that still show it, and kept ones that are right."""
    applied = [(patch, 1.0) for patch in patches]
    with open_sampler(model, Sampling(STEPS, GUIDANCE, SIDE)) as sampler, sampler.applying(applied):
        pictures = sampler.draw(PROMPTS, range(len(PROMPTS)))
    found = judge_labels(judge, PROMPTS, pictures)
    still = [sum(c.name in found[p] for p in FORGOTTEN[c.name]) for c in CONCEPTS]
    return still, sum(all(word in p for word in found[p]) for p in KEPT)


def main(presets):
    model, judge = DiffusersModel.load("demo"), load_judge("demo")
    names = [concept.name for concept in CONCEPTS]
    print(f"| method | patches | {' | '.join(f'{name}, of 3' for name in names)} | kept, of 24 |")
    print("|---|---|" + "---:|" * (len(names) + 1))

    def row(method, how, patches):
        still, kept = count(model, judge, patches)
        print(f"| {method} | {how} | {' | '.join(map(str, still))} | {kept} |", flush=True)

    row("untouched", "", [])
    for preset in presets:
        settings = settings_of(preset, {})
        row(preset, "three", [forget(model, [concept], settings) for concept in CONCEPTS])
        row(preset, "one for all", [forget(model, list(CONCEPTS), settings)])


if __name__ == "__main__":
    main(sys.argv[1:] or [DEFAULT])
