"""All rows of docs/full-size.md that need a GPU, in one run of less than eight minutes.

    COMFYUI_PATH=... python benchmarks/gpu.py
    COMFYUI_PATH=... python benchmarks/gpu.py --small    without a GPU: does every part run?

Runs programs of this folder one after the other, the most important first. Each is stopped when its
seconds are over, and what it has printed until then counts. All of it goes to OUT/gpu.md as it
comes; the terminal tells how far it is. Flux.1 in bf16 needs 24 GB of disk and 30 GB of memory on
the GPU. Linux only.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TOTAL = 470  # seconds
METHODS = "uce", "reread", "resteer", "casteer", "esd"


class Part(NamedTuple):
    """A program to run."""

    title: str
    seconds: int  # at most
    command: tuple[str, ...]
    small: tuple[str, ...]  # what runs in its place with --small


def _methods(model: str, size: int, seconds: int) -> Part:
    command = "methods_full_size.py", model, "--gpu", "--size", str(size), "--method", *METHODS
    small = "methods_full_size.py", "sd15", "--size", "64", "--words", "8", "--method", "uce"
    return Part(f"Methods on {model} at {size} pixels", seconds, command, small)


def _transformer(model: str, form: str, seconds: int) -> Part:
    command = (
        "transformers_full_size.py", model, "--gpu", "--blocks", "0", "--form", form,
        "--size", "384", "--prompts", "40", "--keep", "256",  # Re-read's defaults
    )  # fmt: skip
    small = "transformers_full_size.py", model, "--form", form
    return Part(f"Re-read on {model} in {form}", seconds, command, small)


PARTS = [
    _methods("sd15", 512, 90),
    _transformer("z-image", "fp8", 90),
    _methods("sdxl", 1024, 120),
    _transformer("flux", "fp8", 120),
    Part("Patches of Stable Diffusion XL applied", 60, ("apply.py", "sdxl"),
         ("apply.py", "sd15", "--cpu", "--no-step")),
    _transformer("z-image", "bf16", 90),
    _transformer("flux", "bf16", 120),
]  # fmt: skip


def demo_training(data: Path) -> Part:
    """The demo transformer's training, for half a minute, on pictures that were built before."""
    command = (
        str(HERE.parent / "demo" / "train.py"), "transformer", "--data", str(data), "--minutes",
        "0.5", "--out", str(data / "timed"),
    )  # fmt: skip
    return Part("Training of the demo transformer", 60, command, (*command, "--device", "cpu"))


def run(part: Part, command: tuple[str, ...], seconds: float, path: Path) -> None:
    """Add a part's section to the file, and say there if it was stopped or failed."""
    print(f"\n## {part.title}\n", flush=True)
    start = time.monotonic()
    program = [sys.executable, str(HERE / command[0]), *command[1:]]
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n## {part.title}\n\n    python {' '.join(command)}\n\n")
        file.flush()
        process = subprocess.Popen(program, stdout=file, start_new_session=True)
        try:
            code = process.wait(seconds)
            end = f"ended with code {code}" if code else "done"
        except subprocess.TimeoutExpired:
            end = f"stopped after {seconds:.0f} s: rows are missing"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        said = f"{end}, {time.monotonic() - start:.0f} s"
        file.write(f"\n{said}\n")
    print(said, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder (out/gpu)")
    parser.add_argument("--data", type=Path, help="of demo/pictures.py build, to train on as well")
    parser.add_argument("--small", action="store_true", help="the least of each part, on the CPU")
    options = parser.parse_args()
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("Set COMFYUI_PATH to a ComfyUI.")
    import torch

    if not options.small and not torch.cuda.is_available():
        sys.exit("There is no GPU here: add --small to see whether the parts run.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.md"
    where = "the CPU, small" if options.small else torch.cuda.get_device_name()
    path.write_text(f"# On {where}, torch {torch.__version__}\n", "utf-8")
    end = time.monotonic() + TOTAL
    for part in [*PARTS, *([demo_training(options.data)] if options.data else ())]:
        left = end - time.monotonic()
        if options.small:
            run(part, part.small, 600, path)
        elif left > 20:
            run(part, part.command, min(part.seconds, left), path)
        else:
            print(f"\n{part.title}: no time left", flush=True)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
