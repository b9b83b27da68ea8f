"""Seconds a step and peak memory of training at full size, in a real ComfyUI server on the CPU.

    COMFYUI_PATH=... python benchmarks/full_size.py [sd15] [sdxl] [--size 512] [--steps 3]

Makes a checkpoint with random weights, and for every row starts a fresh server, loads the
checkpoint through the stock loader and draws a picture, so that all weights are in memory; then
trains and saves, and in the kv rows loads the patch, applies it and samples two steps.

Linux only: memory is the server's resident set, as /proc tells it. A row that cannot fit says so.
"""

import argparse
import os
import sys
import tempfile
import time
from itertools import pairwise
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(1, str(ROOT))

from comfyui.conftest import make_base  # noqa: E402
from comfyui.server import Server  # noqa: E402
from comfyui.workflows import checkpoint_loader, drawing, node, saving, training  # noqa: E402
from random_checkpoint import make  # noqa: E402

from fmn.models.families import SD1, SDXL, layers  # noqa: E402
from fmn.training.fit_adapters import in_scope  # noqa: E402

ROWS = [
    {"layers": layers, "full_weights": full, "checkpointing": checkpointing}
    for layers, full in (
        ("kv", False), ("attention", False), ("attention", True), ("unet", False), ("unet", True),
    )
    for checkpointing in (False, True)
]  # fmt: skip
# Full weights keep, in float32: the change, its gradient, AdamW's two moments, the last good copy.
BYTES_A_FULL_WEIGHT = 20
GB = 1e9


def too_large(name, row):
    """What a row of full weights needs, in words, if the free memory cannot hold it."""
    family = {"sd15": SD1, "sdxl": SDXL}[name]
    trained = sum(prod(layer.shape) for layer in in_scope(family, row["layers"]))
    loaded = sum(prod(layer.shape) for layer in layers(family))
    needed = trained * BYTES_A_FULL_WEIGHT + loaded * 4 + 3 * GB
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if row["full_weights"] and needed > free:
        return f"needs about {needed / GB:.0f} GB, {free / GB:.0f} GB are free"
    return ""


def status_bytes(process, name):
    """A value of /proc/PID/status, in bytes."""
    lines = (process / "status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(comfyui, base, checkpoint, size, steps, row):
    """Seconds a step (median without the first), resident bytes before, and at the peak."""
    load = checkpoint_loader(checkpoint.name)
    with Server(comfyui, base, "--disable-metadata") as server:
        server.run(load | drawing(steps=1, size=64))
        process = Path(f"/proc/{server.process.pid}")
        before = status_bytes(process, "VmRSS")
        (process / "clear_refs").write_text("5", "utf-8")  # forget the peak so far
        prompt_id = server.queue(load | training(steps=steps, size=size, **row) | saving("bench"))
        moments = [time.monotonic() for kind, _ in server.events(prompt_id) if kind == "progress"]
        peak = status_bytes(process, "VmHWM")
        outputs = server.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        if row["layers"] != "kv":
            # ComfyUI keeps the unpatched copy of every patched weight: a whole U-Net twice.
            return median_wait(moments), before, peak
        applied = {
            "load": node("FMN_LoadForgetPatch", file=outputs["save"]["text"][0]),
            "apply": node(
                "FMN_ApplyForgetPatch", model=["demo", 0], patch=["load", 0], strength=1.0
            ),
        }
        server.run(load | applied | drawing(["apply", 0], steps=2, size=size))
    return median_wait(moments), before, peak


def median_wait(moments):
    waits = sorted(b - a for a, b in pairwise(moments))
    return waits[len(waits) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=["sd15", "sdxl"])
    parser.add_argument("--size", type=int, default=512, help="pixels a side (512)")
    parser.add_argument("--steps", type=int, default=3, help="training steps a row (3)")
    parser.add_argument("--rows", help="comma-separated row numbers, from 1")
    options = parser.parse_args()
    comfyui = os.environ["COMFYUI_PATH"]
    chosen = [int(n) - 1 for n in options.rows.split(",")] if options.rows else range(len(ROWS))
    print(f"{os.cpu_count()} CPUs, {options.size} px, batch 1, float32, {options.steps} steps")
    print("model  layers     train     recompute   s/step   loaded GB   peak GB   beyond GB")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(Path(folder))
            checkpoint = base / "models" / "checkpoints" / f"{name}.safetensors"
            make(name, checkpoint)
            for index in chosen:
                row = ROWS[index]
                label = (
                    f"{name:<7}{row['layers']:<11}{'full' if row['full_weights'] else 'rank 4':<10}"
                    f"{'yes' if row['checkpointing'] else 'no':<10}"
                )
                reason = too_large(name, row)
                if reason:
                    print(f"{label}not measured: {reason}", flush=True)
                    continue
                seconds, before, peak = measure(
                    comfyui, base, checkpoint, options.size, options.steps, row
                )
                print(
                    f"{label}{seconds:>8.1f}{before / GB:>12.2f}{peak / GB:>10.2f}"
                    f"{(peak - before) / GB:>12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
