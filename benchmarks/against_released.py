"""Ours against the loops that others released: time and memory, same machine, same run, one table.

    COMFYUI_PATH=... python benchmarks/against_released.py [--size 256 512] [--rows NAME ...]

Stable Diffusion 1.5 at its real size, with random weights, in float32 by diffusers; batch 1. Each
row has a process of its own. What trains is stopped after a few steps, and a run is its set-up and
a mean step times the steps of a run, both measured; that is marked by ~. Other rows are whole runs.
Loading the checkpoint is in no row. Seconds on a CPU are those that all threads
computed, which other programs on the same cores change little; on idle cores a run takes about
that, divided by the number of threads. On a GPU they are seconds that pass.

    released FMN     Forget-Me-Not as released: all of the U-Net by AdamW, 35 steps
    released ESD     ESD as of 2025: esd-x, bfloat16, 200 steps; one draws 24.5 of 50 steps on
                     average, which is computed from two steps that draw 2 and 8
    resteer          ours: keys and values at rank 4, 35 steps, with its looks at the attention
    reread           ours, the default method, layer by layer
    reread quick     its preset for machines without a GPU; half: with drawings of half the side
    uce              ours, a closed form, one concept, the default keep-list (383 words)
    uce 100          the same for 100 concepts with 1000 prompts to keep
    peak GB          highest memory while it ran, with the model; on a GPU what torch allocated
    beyond           the part of it above that of the loaded model
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
GB = 1e9
UNET, OTHERS = 3.44 * GB, 0.83 * GB  # float32 weights; the text encoder and the autoencoder
SPARE = 2 * GB
CONCEPT = "elon musk", "identity"


def clock():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Enough(Exception):
    """Ends a method's run after some steps."""


def trained(preset, steps, **changes):
    """A row of a method that trains; it stops after as many steps as are measured."""

    def run(model, size, measured):
        from fmn.concepts.concept import Concept
        from fmn.methods import forget, settings_of

        moments = [clock()]

        def on_step(step):
            moments.append(clock())
            if step.index == measured:
                raise Enough

        settings = settings_of(preset, {"size": size, "steps": steps} | changes)
        with suppress(Enough):
            forget(model, [Concept(*CONCEPT)], settings, on_step)
        return moments, steps

    return run


def literal(name, steps):
    def run(model, size, measured):
        import released

        loop = getattr(released, name)(model.pipeline, CONCEPT[0], size)
        moments = [clock()]
        for _ in range(measured):
            next(loop)
            moments.append(clock())
        return moments, steps

    return run


def whole(preset, concepts=1, kept=0, share=1):
    def run(model, size, measured):
        from fmn.concepts.concept import Concept
        from fmn.concepts.keep_list import keep_words
        from fmn.concepts.prompt_templates import kept_sentences
        from fmn.methods import forget, settings_of

        named = [Concept(*CONCEPT)]
        changes = {"size": size // share} if preset.startswith("reread") else {}
        if concepts > 1:
            named = [Concept(name, "style") for name in keep_words("artists")[:concepts]]
            changes = {"keep_list": "none"}
        words = [*keep_words("common"), *keep_words("people")]
        # Some sentences come twice.
        keep = list(dict.fromkeys(kept_sentences(words, keep_words("styles"), 2 * kept)[1:]))[:kept]
        if len(named) != concepts or len(keep) < kept:
            sys.exit(f"{len(named)} concepts and {len(keep)} prompts: the lists are shorter.")
        start = clock()
        forget(model, named, settings_of(preset, changes), keep=keep)
        return [start, clock()], None

    return run


# name: (what runs, steps that are measured, bytes it needs beside the other parts)
ROWS = {
    "released FMN": (literal("forget_me_not", 35), 4, 4 * UNET),
    "released ESD": (literal("esd", 200), 3, 2 * UNET),
    "resteer": (trained("resteer", 35), 6, UNET),
    "resteer, checkpointing": (trained("resteer", 35, checkpointing=True), 6, UNET),
    "reread": (whole("reread"), 0, UNET),
    "reread quick": (whole("reread-quick"), 0, UNET),
    "reread quick, half": (whole("reread-quick", share=2), 0, UNET),
    "uce": (whole("uce"), 0, UNET),
    "uce 100": (whole("uce", 100, 1000), 0, UNET),
}
ACTIVATIONS = {256: 2 * GB, 512: 6 * GB}


def measure(name, checkpoint, size, device):
    """One row, in this process."""
    import torch
    from released import TILL

    from fmn.hosts.diffusers.model import DiffusersModel
    from fmn.training.memory import peak_memory, process_memory

    if device == "cpu":
        torch.cuda.is_available = lambda: False  # for the clock and the memory
    model = DiffusersModel.load(checkpoint, device)
    loaded = torch.cuda.memory_allocated() if device == "cuda" else process_memory()
    run, measured, _ = ROWS[name]
    with peak_memory() as peak:
        moments, steps = run(model, size, measured)
        beyond = peak()
    waits = [b - a for a, b in pairwise(moments)]
    found = {"loaded": loaded, "beyond": beyond, "whole": waits[0]}
    if steps:
        # The first step allocates: it and what comes before count as set-up.
        step = sum(waits[1:]) / len(waits[1:])
        if name == "released ESD":
            few, many = TILL
            step = waits[1] + (waits[2] - waits[1]) * (24.5 - few) / (many - few)
        setup = max(0.0, waits[0] - step)
        found |= {"step": step, "steps": steps, "setup": setup, "whole": setup + step * steps}
    return found


def table(checkpoint, size, device, names):
    import torch

    from fmn.training.memory import free_memory

    print(f"\n{device}, {size} px\n")
    print(
        "| | set-up s | s/step | steps | run s | of FMN's time | peak GB | beyond | of FMN's peak |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    base = None
    for name in names:
        needed = ROWS[name][2] + OTHERS + ACTIVATIONS.get(size, 6 * GB) + SPARE
        free = free_memory(torch.device("cpu"))
        if device == "cpu" and needed > free:
            required = f"{needed / GB:.0f} GB with {SPARE / GB:.0f} to spare"
            print(f"| {name} | not measured: {required}, {free / GB:.0f} are free |||||||||")
            continue
        command = [sys.executable, __file__, "--row", name, "--size", str(size)]
        command += ["--device", device, "--checkpoint", str(checkpoint)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.splitlines()[-1:]} |||||||||", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        row["peak"] = row["loaded"] + row["beyond"]
        base = base or row
        if "step" in row:
            run = f"{row['setup']:.1f} | {row['step']:.2f} | {row['steps']} | ~{row['whole']:.0f}"
        else:
            run = f"| | | {row['whole']:.1f}"
        time_share, peak_share = row["whole"] / base["whole"], row["peak"] / base["peak"]
        shares = (
            (f"1/{1 / time_share:.1f}", f"{peak_share:.2f}") if names[0] == "released FMN" else "--"
        )
        print(
            f"| {name} | {run} | {shares[0]} | {row['peak'] / GB:.2f} | {row['beyond'] / GB:.2f} | "
            f"{shares[1]} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="pixels a side (256)")
    parser.add_argument(
        "--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS), metavar="ROW"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: both, if there is cuda")
    parser.add_argument("--checkpoint", help="a file of random_checkpoint.py; else one is made")
    parser.add_argument("--row", choices=sorted(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        found = measure(options.row, options.checkpoint, options.size[0], options.device)
        print(json.dumps(found))
        return
    import torch
    from random_checkpoint import checkpoint

    from fmn.training.memory import free_memory

    free = free_memory(torch.device("cpu"))
    devices = [options.device] if options.device else ["cpu", "cuda"]
    print(f"Stable Diffusion 1.5, random weights; {os.cpu_count()} CPU cores, torch uses ", end="")
    print(f"{torch.get_num_threads()}; {free / GB:.0f} GB free", flush=True)
    with checkpoint("sd15", options.checkpoint) as path:
        for device in devices:
            for size in options.size:
                if device == "cuda" and not torch.cuda.is_available():
                    print(f"\ncuda, {size} px: not measured, there is no GPU here")
                else:
                    table(path, size, device, options.rows)


if __name__ == "__main__":
    main()
