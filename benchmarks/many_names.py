"""Thousands of names in one patch: seconds, memory, rank and file, each by one command.

    COMFYUI_PATH=... python benchmarks/many_names.py demo sd15 --counts 1000 10000 --method uce

The names are those of the shipped lists, then the same with "red", "old" and so on before them.
Models but ``demo`` have random weights, so nothing is said of how well they forget. Each row is
``python -m fmn forget`` as a whole: loading, looking for neighbours, measuring what is left, and
saving.

    GB       highest resident memory of the process
    MB       the file, of which: names and the rest of the record
    cut      the file with a quarter of the weights, by ``python -m fmn merge --budget-kb``, and
             what of the change (relative Frobenius norm) is lost
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from random_checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fmn.concepts.wordlists import entries  # noqa: E402
from fmn.patches.patch import load_patch  # noqa: E402

LISTS = "common", "things", "people", "artists", "styles"
ADJECTIVES = "red", "blue", "old", "tiny", "golden", "wooden", "paper"
CUT = 4  # to this part of the weights


def names(count):
    listed = list(dict.fromkeys(name for key in LISTS for name in entries(key)))
    many = [*listed, *(f"{word} {name}" for word in ADJECTIVES for name in listed)]
    return list(dict.fromkeys(many))[:count]


def run(*arguments):
    """Seconds, highest resident bytes and output of a command of the package."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "fmn", *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        said = output.read()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return time.monotonic() - start, usage.ru_maxrss * 1024, said


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="+", choices=("demo", "sd15", "sdxl"))
    parser.add_argument("--method", nargs="+", default=["uce"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1000, 10_000])
    options = parser.parse_args()
    print("| model | method | names | seconds | GB | rank | MB | names MB | cut to MB | lost |")
    print("|---|---|" + "---:|" * 8)
    for name in options.model:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = name if name == "demo" else stack.enter_context(checkpoint(name))
            for method in options.method:
                for count in options.counts:
                    concepts = folder / "names.txt"
                    file = folder / f"{method}{count}.safetensors"
                    cut = folder / f"{method}{count}_cut.safetensors"
                    concepts.write_text("\n".join(names(count)), "utf-8")
                    more = "--list", concepts, "--method", method, "--out", file
                    seconds, peak, _ = run("forget", model, *more)
                    patch, size = load_patch(file), file.stat().st_size
                    header = int.from_bytes(file.read_bytes()[:8], "little")
                    kb = (2 * header + (size - header) // CUT) // 1000  # the record grows
                    report = run("merge", file, "--out", cut, "--budget-kb", kb)[2]
                    lost = re.search(r"cut off: (\S+) of the change", report)[1]
                    cells = [
                        name, method, f"{count:,}", f"{seconds:.0f}", f"{peak / 1e9:.1f}",
                        max(patch.ranks), f"{size / 1e6:.1f}", f"{header / 1e6:.1f}",
                        f"{cut.stat().st_size / 1e6:.1f}", lost,
                    ]  # fmt: skip
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
