"""Forget patches beside other people's LoRAs, on the demo model.

    python benchmarks/other_loras.py reread uce

A LoRA is trained for each of two things that the model never knew; one or both are then applied.
Every second target of the suite ``demo-wide`` is then forgotten by a patch made on the bare model,
and by one made on the model with the LoRA. UA, IRA and CRA are those of ConceptBench, in %;
pictures count that are right with the LoRA alone. ``taught``: the share of pictures of what the
LoRA taught that show it, over all patches, by the first judge; of both things without a LoRA.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compose import Bench

from fmn.bench.measures.relearn import RelearnSettings, fine_tune, make_adapters
from fmn.bench.measures.trial import Trial
from fmn.bench.reporting.statistics import unlearn_canvas
from fmn.bench.running.lab import read_controls
from fmn.bench.suite import SPLITS, load_suite
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.jobs.batch import CachingModel
from fmn.methods import DEFAULT, settings_of
from fmn.models.adapters import attached
from fmn.models.image_sampler import open_sampler

ROOT = Path(__file__).resolve().parent.parent
LESSON = RelearnSettings(steps=400)
ALONE = 24  # pictures of each thing without a patch
COMBINATIONS = ((), ("kangaroo",), ("kangaroo", "accordion"))
KEYS = "UA", "IRA", "CRA", "HM"


def lora(bench, name, pictures):
    """Changes of layers, trained on pictures of one thing by the ordinary loss."""
    prompts = [f"a photo of {name}"] * len(pictures)
    with open_sampler(bench.model, bench.suite.sampling) as sampler:
        adapters = make_adapters(sampler, LESSON.rank, seed=0)
        with attached(adapters, sampler.denoiser.module):
            fine_tune(sampler, adapters, prompts, pictures, LESSON, seed=0)
    factors = {layer: adapter.factors(LESSON.rank) for layer, adapter in adapters.items()}
    return {layer: up @ down for layer, (up, down, _) in factors.items()}


def with_loras(bench, loras):
    """A bench whose model has LoRAs in its weights."""
    other, model = copy.copy(bench), DiffusersModel.load(bench.suite.model)
    for changes in loras:
        for layer, change in changes.items():
            model.unet.get_submodule(layer).weight.data += change
    other.model, other.untouched = CachingModel(model), {}
    return other


def share_taught(bench, patches, names, count):
    """How many of the pictures of what LoRAs taught show it, and of how many; ``count`` of each."""
    suite, seen, asked = bench.suite, 0, 0
    with open_sampler(bench.model, suite.sampling) as sampler, sampler.applying(patches):
        trial = Trial(suite, suite.targets[0], sampler, *bench.judges)
        for name in names:
            asks = [trial.ask(f"a photo of {name}", i) for i in range(count)]
            seen += trial.labels(trial.draw(asks))["concept"].count(name.split()[-1])
            asked += len(asks)
    return seen, asked


def measured(bench, maker, targets, settings, names):
    """Judged pictures of all targets, each with its patch by ``maker``, and shares taught."""
    rows, shares = [], []
    for target in targets:
        patches = [(maker.train([target], settings), 1.0)]
        rows += bench.rows(patches, [target])
        shares.append(share_taught(bench, patches, names, bench.count))
    return rows, shares


def show(cells, rows, taught):
    shares = unlearn_canvas(rows) if rows else {}
    numbers = [f"{100 * shares[name]['value']:.1f}" if rows else "" for name in KEYS]
    seen, asked = (sum(each) for each in zip(*taught)) if taught else (0, 0)
    print(f"| {' | '.join([*cells, *numbers, f'{100 * seen / asked:.0f}' if asked else ''])} |")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="*", default=[DEFAULT])
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=4, help="a question")
    options = parser.parse_args()
    suite = load_suite("demo-wide")
    targets = [target for target in suite.targets if target.split == options.split][::2]
    bare = Bench(suite, options.pictures)
    controls = read_controls(str(ROOT / "demo" / "controls"))
    taught = {"kangaroo": "a kangaroo", "accordion": "an accordion"}
    loras = {name: lora(bare, taught[name], controls[name]) for name in taught}
    print("| method | LoRA | patches made | UA | IRA | CRA | mean | taught |")
    print("|---|---|---|" + "---:|" * 5)
    for chosen in COMBINATIONS:
        bench, label = with_loras(bare, [loras[name] for name in chosen]), " and ".join(chosen)
        names = [taught[name] for name in chosen or taught]  # without a LoRA: what the model knows
        show(["no patch", label or "none", ""], [], [share_taught(bench, [], names, ALONE)])
        makers = {"without it": bare, "with it": bench} if chosen else {"": bare}
        for method in options.method:
            for where, maker in makers.items():
                rows, shares = measured(bench, maker, targets, settings_of(method, {}), names)
                show([method, label or "none", where], rows, shares if chosen else [])


if __name__ == "__main__":
    main()
