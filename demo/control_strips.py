"""Draw the controls, things that the demo model was never taught, as strips for the relearn probe.

    python demo/control_strips.py --packages build/demo/packages

Writes controls/NAME.png beside this file: square pictures side by side, one a style.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import pictures
from fmn.files import write_whole

HERE = Path(__file__).resolve().parent
# Of six that the judges know: the probe teaches each, which takes as long as teaching the target.
USED = "accordion", "kangaroo"


def controls():
    """Those of ``controls.csv`` that are used."""
    with open(HERE / "controls.csv", newline="", encoding="utf-8") as file:
        return [pictures.Concept(**row) for row in csv.DictReader(file) if row["concept"] in USED]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, default=Path("build/demo/packages"))
    given = parser.parse_args(arguments)
    packages = pictures.Packages(pictures.fetch(given.packages))
    for concept in controls():
        drawn = [pictures.draw_style(packages, concept, style) for style in pictures.STYLES]
        strip = Image.fromarray(np.concatenate([one for one in drawn if one is not None], axis=1))
        path = HERE / "controls" / f"{concept.concept}.png"
        write_whole(path, lambda file, strip=strip: strip.save(file, "PNG", optimize=True))
        print(f"{path.name}: {strip.width // strip.height} pictures")


if __name__ == "__main__":
    main()
