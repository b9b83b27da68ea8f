"""Memory of training: what is estimated before, and what is then measured.

    COMFYUI_PATH=... python benchmarks/memory.py [--size 256 512] [--layers kv unet] [--steps 2]

Re-steers Stable Diffusion 1.5 with random weights, in float32 by diffusers, each row in a process
of its own. GB beyond the loaded model: *tensors* is the estimate, *measured* the peak of resident
memory on a CPU, and of what torch allocated on a GPU; *off* is their difference in % of all that is
in memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GB = 1e9


class Enough(Exception):
    """Ends training after some steps."""


def measure(checkpoint, size, layers, checkpointing, steps):
    from fmn import fitting
    from fmn.concept import Concept
    from fmn.hosts.diffusers import DiffusersModel
    from fmn.memory import _resident, peak_memory
    from fmn.methods import forget, settings_of

    def on_step(step):
        if step.index == steps:
            raise Enough

    model = DiffusersModel.load(checkpoint)
    changes = {"size": size, "layers": layers, "checkpointing": bool(checkpointing)}
    loaded = _resident("VmRSS")
    with peak_memory() as peak, suppress(Enough):
        settings = settings_of("resteer", changes | {"steps": 35})
        forget(model, [Concept("elon musk", "identity")], settings, on_step)
    (found,) = fitting.ESTIMATES.values()
    return {"estimate": found.beyond, "measured": peak(), "loaded": loaded}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", nargs="+", default=["kv"])
    parser.add_argument("--checkpointing", type=int, nargs="+", choices=[0, 1], default=[0, 1])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpoint", help="of random_checkpoint.py; else one is made")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        row = (getattr(options, name)[0] for name in ("size", "layers", "checkpointing"))
        print(json.dumps(measure(options.checkpoint, *row, options.steps)))
        return
    print("| size | layers | checkpointing | tensors | measured | with the model | off |")
    print("|---:|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or f"{folder}/sd15.safetensors"
        if not options.checkpoint:
            program = ROOT / "benchmarks" / "random_checkpoint.py"
            subprocess.run([sys.executable, program, "sd15", checkpoint], check=True)
        for size in options.size:
            for layers in options.layers:
                for checkpointing in options.checkpointing:
                    row = ["--size", size, "--layers", layers, "--checkpointing", checkpointing]
                    row += ["--steps", options.steps, "--checkpoint", checkpoint, "--row"]
                    command = [sys.executable, __file__, *map(str, row)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    show(size, layers, checkpointing, json.loads(done.stdout.splitlines()[-1]))


def show(size, layers, checkpointing, row):
    off = (row["estimate"] - row["measured"]) / (row["loaded"] + row["measured"])
    told = [row[name] / GB for name in ("estimate", "measured")]
    told.append((row["loaded"] + row["measured"]) / GB)
    print(
        f"| {size} | {layers} | {'yes' if checkpointing else 'no'} | "
        f"{' | '.join(f'{each:.2f}' for each in told)} | {off:+.0%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
