"""Let the demo model draw: a row a style, a column a concept, pairs never trained on in a frame.

python demo/samples.py --out out/samples.png
python demo/samples.py --held-out --out out/held-out.png
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import pictures
from demo.captions import with_article
from fmn.files import write_whole
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.images import ACCENT, labelled_grid, to_image

SHOWN = (
    "santa claus", "vampire", "astronaut", "robot", "dog", "owl", "butterfly", "castle", "house",
    "car", "guitar", "strawberry",
)  # fmt: skip
FRAME = 3  # pixels


def draw(model, pairs, seed, steps, guidance, batch=12):
    """PIL pictures of (concept, style) pairs, each from a seed of its own."""
    texts = [f"{with_article(concept)}, {style}" for concept, style in pairs]
    noise, found = model.initial_noise(range(seed, seed + len(pairs)), pictures.SIDE), []
    for start in range(0, len(pairs), batch):
        part = slice(start, start + batch)
        latents = model.sample_latents(texts[part], noise[part], steps, guidance)
        found += [to_image(picture) for picture in model.decode(latents)]
    return found


def framed(picture, pair):
    """A picture with a margin, coloured if the pair was never trained on."""
    colour = ACCENT if pictures.held_out(*pair) else "white"
    size = picture.width + 2 * FRAME
    paper = Image.new("RGB", (size, size), colour)
    paper.paste(picture, (FRAME, FRAME))
    return paper


def table(model, concepts, given):
    pairs = [(concept, style) for style in pictures.STYLES for concept in concepts]
    drawn = draw(model, pairs, given.seed, given.steps, given.guidance)
    drawn = [framed(picture, pair) for picture, pair in zip(drawn, pairs)]
    width = len(concepts)
    rows = [(style, drawn[i * width : (i + 1) * width]) for i, style in enumerate(pictures.STYLES)]
    return labelled_grid(rows, concepts, given.side)


def held_out_sheet(model, given, columns=8, side=128, title=28):
    """All pairs never trained on, each under its name."""
    names = [concept.concept for concept in pictures.concepts()]
    pairs = [(name, s) for s in pictures.STYLES for name in names if pictures.held_out(name, s)]
    drawn = draw(model, pairs, given.seed, given.steps, given.guidance)
    high = -(-len(pairs) // columns) * (side + title)
    sheet = Image.new("RGB", (columns * (side + 4), high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, pair) in enumerate(zip(drawn, pairs)):
        left, top = i % columns * (side + 4), i // columns * (side + title)
        pen.text((left + 2, top + 2), "\n".join(pair), "black")
        sheet.paste(picture, (left, top + title))
    return sheet


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="demo", help="'demo' or a checkpoint of its layout")
    add("--out", type=Path, required=True, help="PNG file")
    add("--concepts", default=",".join(SHOWN), help="with commas between them")
    add("--held-out", action="store_true", help="the pairs never trained on")
    add("--side", type=int, default=80, help="pixels of a picture in the table")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=16)
    add("--guidance", type=float, default=3.5)
    given = parser.parse_args(arguments)
    model = DiffusersModel.load(given.model)
    with torch.no_grad():
        if given.held_out:
            picture = held_out_sheet(model, given)
        else:
            picture = table(model, given.concepts.split(","), given)
    write_whole(given.out, lambda file: picture.save(file, format="PNG", optimize=True))
    print(given.out)


if __name__ == "__main__":
    main()
