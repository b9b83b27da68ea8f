"""How well "the model may not know" tells words that the demo model never saw from those it knows.

    python benchmarks/known_words.py

Prints, for each group of words, how many would be warned about, and the closest calls. The answer
after a training uses the same numbers (``fmn.metrics.outcome``), of a patch that changes nothing.
"""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from fmn.concepts.concept import Concept  # noqa: E402
from fmn.hosts.diffusers.model import DiffusersModel  # noqa: E402
from fmn.metrics.outcome import KNOWN, KNOWN_WORD, outcomes  # noqa: E402
from fmn.patches.patch import ForgetPatch  # noqa: E402

UNSEEN = """
unicorn lighthouse saxophone microscope kangaroo accordion dinosaur waterfall helmet sword piano
bridge windmill tractor skateboard submarine compass telescope anchor dragon parrot ostrich giraffe
lobster spider squirrel hedgehog fox lion camel zebra gorilla chair table sofa lamp refrigerator
toaster spoon fork bottle wine onion garlic pepper pumpkin potato shoe sock
"""
MADE_UP = "vondrip krobbit quilvash mexfil plixter snafferel zempthal brintock oddlewick yurpole"


def groups() -> dict[str, list[str]]:
    with open(ROOT / "demo" / "concepts.csv", encoding="utf-8") as file:
        known = [row["concept"] for row in csv.DictReader(file) if row["concept"] != KNOWN_WORD]
    return {"known": known, "never seen": UNSEEN.split(), "made up": MADE_UP.split()}


def main() -> None:
    model = DiffusersModel.load("demo")
    layer = next(layer for layer in model.family.marking())
    out, width = layer.shape
    nothing = ForgetPatch(
        model.family, {layer.name: (torch.zeros(out, 1), torch.zeros(1, width))}, {}
    )
    for group, words in groups().items():
        strengths = {word: outcomes(model, nothing, [Concept(word)])[0].strength for word in words}
        warned = sum(strength < KNOWN for strength in strengths.values())
        close = sorted(strengths, key=lambda word: abs(strengths[word] - KNOWN))[:4]
        shown = ", ".join(f"{word} {strengths[word]:.2f}" for word in close)
        print(f"{group}: {warned} of {len(words)} warned about; closest to {KNOWN}: {shown}")


if __name__ == "__main__":
    main()
