"""UCE's cost against how much is asked of it: concepts, kept prompts, layers; one table each.

    python benchmarks/sweep.py [--family sdxl] [--concepts 1 10 100 1000] [--budget-mb 100]

The algebra alone, at full size: weights are random, and so are contexts, of the norm that CLIP's
have. Encoding comes on top; ``counts.py`` tells what it takes. Of real words' contexts many are
alike, and the error of a cut is smaller than here.

    s           seconds that all threads computed, for the whole patch
    rank, MB    of the exact patch
    cut, error  seconds to cut it to the budget (``python -m fmn merge --budget-kb``), and the
                relative Frobenius error of that over all layers
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from closed_form import NORM, Weights

from fmn.closed_form import input_edit
from fmn.closed_form.text_embeddings import Pairs
from fmn.concepts.concept import Concept
from fmn.methods.uce import Settings
from fmn.models.families import FAMILIES
from fmn.patches.merge import merge_patches
from fmn.patches.task import Task

CONCEPTS, KEPT = 100, 1000  # where they do not vary


def contexts(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return NORM * width**-0.5 * rows


def row(model, concepts, kept, layers, budget):
    width = model.family.context_dim
    pairs = Pairs(contexts(concepts, width, 1), contexts(concepts, width, 2))
    chosen = input_edit.key_value_layers(model.family)[:layers]
    named = [Concept(f"concept {i}") for i in range(concepts)]
    keep = contexts(kept, width, 3)
    whole, input_edit.key_value_layers = input_edit.key_value_layers, lambda *_: chosen
    start = time.process_time()
    try:
        patch = input_edit.input_patch(
            Task(model, named, Settings()), pairs, lambda _: input_edit.uce(*pairs, keep)
        )
    finally:
        input_edit.key_value_layers = whole
    seconds = time.process_time() - start
    size = sum(part.numel() * 2 for factors in patch.changes.values() for part in factors)
    cells = [concepts, kept, layers, f"{seconds:.1f}", max(patch.ranks), f"{size / 1e6:.1f}"]
    if size > budget:
        start = time.process_time()
        error = merge_patches([(patch, 1.0)], budget).patch.info["truncation_error"]
        cells += [f"{time.process_time() - start:.1f}", f"{error:.2f}"]
    print(f"| {' | '.join(map(str, cells + ['-'] * (8 - len(cells))))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), default="sdxl")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 10, 100, 1000, 10000])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 35, 70, 140])
    parser.add_argument("--budget-mb", type=float, default=100.0)
    options = parser.parse_args()
    model = Weights(FAMILIES[options.family])
    every = len(input_edit.key_value_layers(model.family))
    sweeps = {
        "Concepts": [(count, KEPT, every) for count in options.concepts],
        "Kept prompts": [(CONCEPTS, count, every) for count in options.kept],
        "Layers": [(CONCEPTS, KEPT, min(count, every)) for count in options.layers],
    }
    print(f"{options.family}, {torch.get_num_threads()} threads")
    for title, cells in sweeps.items():
        print(f"\n{title}\n")
        print("| concepts | kept | layers | s | rank | MB | cut | error |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for each in cells:
            row(model, *each, int(options.budget_mb * 1e6))


if __name__ == "__main__":
    main()
