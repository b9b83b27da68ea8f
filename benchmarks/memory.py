"""Memory of training: what is estimated before, and what is then measured.

    COMFYUI_PATH=... python benchmarks/memory.py [--size 256 512] [--layers kv unet] [--steps 2]

Re-steers Stable Diffusion 1.5 with random weights, in float32 by diffusers, each row in processes
of their own that made the same steps once before, for what Python loads and kernels that are
compiled for these sizes, which take some 0.1 GB. GB beyond that:

    estimate    what is told before training
    alive       peak of what torch allocated on a GPU. On a CPU, of resident memory where malloc
                gives back what is freed from the start of the process; off: how far the estimate is
    given back  peak of resident memory on a CPU where training asks malloc for that, as it does
                when memory is short; seconds a step, of all threads
    kept        the same where training asks malloc to keep what is freed, as it does else
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from random_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GB = 1e9
ROW = "size", "layers", "checkpointing", "heap"
HEAPS = "alive", "given back", "kept"
STRICT = {"MALLOC_TRIM_THRESHOLD_": "131072"}


class Enough(Exception):
    """Ends training after some steps."""


def measure(path, size, layers, checkpointing, heap, steps):
    import time

    from fmn.concepts.concept import Concept
    from fmn.hosts.diffusers.model import DiffusersModel
    from fmn.methods import forget, settings_of
    from fmn.training import fit_adapters, memory
    from fmn.training.memory import peak_memory

    memory.HELD = 0 if heap == "kept" else 10**6
    times = []

    def on_step(step):
        times.append(time.process_time())
        if step.index == steps:
            raise Enough

    def train(changes):
        fit_adapters.ESTIMATES.clear()
        times.clear()
        with peak_memory() as peak, suppress(Enough):
            settings = settings_of("resteer", changes | {"layers": layers, "steps": 35})
            forget(model, [Concept("elon musk", "identity")], settings, on_step)
        return peak()

    model = DiffusersModel.load(path)
    changes = {"size": size, "checkpointing": bool(checkpointing)}
    train(changes)
    measured = train(changes)
    (found,) = fit_adapters.ESTIMATES.values()
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"estimate": found.beyond, "measured": measured, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", nargs="+", default=["kv"])
    parser.add_argument("--checkpointing", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument("--heap", nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint", help="of random_checkpoint.py; else one is made")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        row = (getattr(options, name)[0] for name in ROW)
        print(json.dumps(measure(options.checkpoint, *row, options.steps)))
        return
    names = "size | layers | checkpointing | estimate | alive | off | given back | s/step | kept"
    print(f"| {names} | s/step |")
    print("|---:|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with checkpoint("sd15", options.checkpoint) as path:
        for size in options.size:
            for layers in options.layers:
                for checkpointing in options.checkpointing:
                    row = size, layers, checkpointing
                    show(row, [in_process(path, *row, x, options.steps) for x in HEAPS])


def in_process(path, *row):
    names = [f"--{name}" for name in (*ROW, "steps")]
    given = [each for pair in zip(names, map(str, row)) for each in pair]
    command = [sys.executable, __file__, *given, "--checkpoint", str(path), "--row"]
    environment = os.environ | (STRICT if row[3] == "alive" else {})
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def show(row, measured):
    size, layers, checkpointing = row
    alive, back, kept = measured
    off = alive["estimate"] / alive["measured"] - 1
    cells = [f"{alive[name] / GB:.2f}" for name in ("estimate", "measured")] + [f"{off:+.0%}"]
    for each in (back, kept):
        cells += [f"{each['measured'] / GB:.2f}", f"{each['seconds']:.1f}"]
    told = "yes" if checkpointing else "no"
    print(f"| {size} | {layers} | {told} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
