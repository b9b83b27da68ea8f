"""Memory of training: the estimate before it, and the measured peak.

    COMFYUI_PATH=... python benchmarks/memory.py [--size 256 512] [--layers kv unet] [--steps 2]

Re-steers Stable Diffusion 1.5 with random weights, in float32 by diffusers. A process for each row
makes the same steps once before, so that libraries are loaded and kernels compiled. GB beyond that:

    estimate    what training tells before it starts, without the weights
    measured    peak of what torch allocated on a GPU; of the process's memory on a CPU
    s/step      seconds a step, of all threads
"""

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from random_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GB = 1e9
ROW = "size", "layers", "checkpointing"


class Enough(Exception):
    """Ends training after some steps."""


def measure(path, size, layers, checkpointing, steps):
    import re
    import time

    from fmn.concepts.concept import Concept
    from fmn.hosts.diffusers.model import DiffusersModel
    from fmn.methods import forget, settings_of
    from fmn.training.memory import peak_memory

    times, messages = [], []

    def on_step(progress):
        times.append(time.process_time())
        messages.append(progress.memory)
        if progress.index == steps:
            raise Enough

    def train(changes):
        times.clear()
        with peak_memory() as peak, suppress(Enough):
            settings = settings_of("resteer", changes | {"layers": layers, "steps": 35})
            forget(model, [Concept("elon musk", "identity")], settings, on_step)
        return peak()

    model = DiffusersModel.load(path)
    changes = {"size": size, "checkpointing": bool(checkpointing)}
    train(changes)
    measured = train(changes)
    estimate = sum(
        float(re.search(rf"{part} ([\d.]+) GB", messages[-1])[1]) * GB
        for part in ("activations", "optimizer")
    )
    seconds = (times[-1] - times[0]) / (len(times) - 1)
    return {"estimate": estimate, "measured": measured, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", nargs="+", default=["kv"])
    parser.add_argument("--checkpointing", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpoint", help="of random_checkpoint.py; else one is made")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        row = (getattr(options, name)[0] for name in ROW)
        print(json.dumps(measure(options.checkpoint, *row, options.steps)))
        return
    print("| size | layers | checkpointing | estimate | measured | s/step |")
    print("|---:|---|---|---:|---:|---:|", flush=True)
    with checkpoint("sd15", options.checkpoint) as path:
        for size in options.size:
            for layers in options.layers:
                for checkpointing in options.checkpointing:
                    row = size, layers, checkpointing
                    show(row, in_process(path, *row, options.steps))


def in_process(path, *row):
    names = [f"--{name}" for name in (*ROW, "steps")]
    given = [text for pair in zip(names, map(str, row)) for text in pair]
    command = [sys.executable, __file__, *given, "--checkpoint", str(path), "--row"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(row, found):
    size, layers, checkpointing = row
    estimate, measured = (f"{found[name] / GB:.2f}" for name in ("estimate", "measured"))
    answer, seconds = "yes" if checkpointing else "no", f"{found['seconds']:.1f}"
    print(f"| {size} | {layers} | {answer} | {estimate} | {measured} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
