"""Correction and disentanglement on the demo model: pictures and numbers of docs/correction.md.

    python benchmarks/correction.py --out out/correction

Trains a patch for each example and each way, draws the same prompts from the same seeds with and
without it, and asks the judge what they show. Writes the patches, a grid of each example and the
numbers; takes a few minutes on one CPU core.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmn.concepts.concept import Concept
from fmn.files import write_whole
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.images import labelled_grid, to_image
from fmn.methods import ablation, resteer, uce
from fmn.metrics.load import load_judge
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling
from fmn.patches.patch import save_patch

SAMPLING = Sampling(12, 3.5)
DRAWN = {"sample_steps": SAMPLING.steps, "guidance": SAMPLING.guidance}


class Way(NamedTuple):
    """How an example is trained."""

    method: object
    concept: Concept
    settings: object
    keep: tuple[str, ...] = ()


class Example(NamedTuple):
    """A fault, the ways to mend it, and what is drawn.

    Attributes:
        ways: title -> ``Way``.
        groups: title -> {prompt: what it should show}.
    """

    ways: dict[str, Way]
    groups: dict[str, dict[str, str]]


# The demo model's captions never have the word "puppy", so it draws anything.
PUPPY = Concept(
    "puppy", "custom", anchor="dog",
    prompts=("puppy", "a puppy, noto emoji", "a puppy, blob emoji", "a puppy, ink drawing"),
)  # fmt: skip
# They have "christmas" in "christmas tree" only, so the word brings the tree along.
CHRISTMAS = Concept(
    "christmas", "custom",
    prompts=tuple(
        f"a christmas {thing}, {style}"
        for style, things in {
            "noto emoji": ("cat", "house", "drum", "banana", "wizard", "owl"),
            "3d render": ("apple", "bus", "bear", "trumpet", "tulip", "cat"),
            "twemoji": ("car", "cow", "house", "lemon", "wizard", "violin"),
        }.items()
        for thing in things
    ),
)  # fmt: skip
TREES = tuple(f"a christmas tree, {style}" for style in ("noto emoji", "3d render", "twemoji"))

EXAMPLES = {
    "correction": Example(
        {
            "ablation": Way(ablation, PUPPY, ablation.Settings(lr=3e-3, samples=1, **DRAWN)),
            "uce": Way(uce, PUPPY, uce.Settings()),
        },
        {
            "prompts of the patch": {
                "a puppy, noto emoji": "dog",
                "a puppy, ink drawing": "dog",
            },
            "other prompts": {
                "a puppy, 3d render": "dog",
                "a puppy, twemoji": "dog",
                "a photo of a puppy": "dog",
                "a puppy in the style of black silhouette": "dog",
            },
            "to stay": {
                "a dog, 3d render": "dog",
                "a cat, noto emoji": "cat",
                "a wizard, twemoji": "wizard",
                "a castle, 3d render": "castle",
            },
            "another word that it does not know": {"a kitten, 3d render": "cat"},
        },
    ),
    "disentanglement": Example(
        {
            "ablation": Way(
                ablation, CHRISTMAS,
                ablation.Settings(
                    steps=150, lr=4e-3, rank=8, no_anchor="rest", samples=1, **DRAWN
                ),
                TREES,
            ),
            "re-steer": Way(resteer, CHRISTMAS, resteer.Settings(references="samples")),
        },
        {
            "prompts of the patch": {
                "a christmas house, noto emoji": "house",
                "a christmas bus, 3d render": "bus",
            },
            "other things": {
                "a christmas dog, noto emoji": "dog",
                "a christmas guitar, noto emoji": "guitar",
                "a christmas castle, 3d render": "castle",
                "a christmas pig, 3d render": "pig",
                "a christmas robot, twemoji": "robot",
                "a christmas rose, twemoji": "rose",
            },
            "kept": {"a christmas tree, noto emoji": "christmas tree"},
            "the same in a style that was not kept": {
                "a christmas tree, ink drawing": "christmas tree"
            },
            "to stay": {
                "a dog, noto emoji": "dog",
                "a castle, 3d render": "castle",
                "a robot, twemoji": "robot",
                "a tree, noto emoji": "tree",
            },
        },
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/correction", help="folder for what is made")
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt (default 2)")
    parser.add_argument("--only", choices=list(EXAMPLES), help="one example")
    options = parser.parse_args()
    model, judge = DiffusersModel.load("demo", "cpu"), load_judge("demo")
    out, seeds, found = Path(options.out), range(options.seeds), {}
    for name in [options.only] if options.only else EXAMPLES:
        example = EXAMPLES[name]
        patches = {way: trained(model, *EXAMPLES[name].ways[way]) for way in example.ways}
        for way, patch in patches.items():
            save_patch(patch, out / f"{name}-{way}.safetensors")
        pictures = drawn(model, example, patches, seeds)
        found[name] = measured(judge, example, pictures, len(seeds))
        grid = picture(example, pictures, len(seeds))
        write_whole(out / f"{name}.png", lambda path, grid=grid: grid.save(path, "PNG"))
        print(table(name, found[name]), flush=True)
    text = json.dumps({"seeds": options.seeds, "examples": found}, indent=1)
    write_whole(out / "correction.json", lambda path: path.write_text(text, "utf-8"))


def trained(model, method, concept, settings, keep):
    return method.run(model, [concept], settings, keep=keep)


def drawn(model, example, patches, seeds):
    """Column -> pictures of all prompts, the seeds of one prompt side by side."""
    prompts = [prompt for group in example.groups.values() for prompt in group for _ in seeds]
    every_seed = [seed for group in example.groups.values() for _ in group for seed in seeds]
    with open_sampler(model, SAMPLING) as sampler:
        pictures = {"before": sampler.draw(prompts, every_seed)}
        for way, patch in patches.items():
            with sampler.applying([(patch, 1.0)]):
                pictures[way] = sampler.draw(prompts, every_seed)
    return pictures


def measured(judge, example, pictures, each):
    """Group -> column -> (share of pictures that show what they should, change in pixels)."""
    labels, start, found = judge.labels["concept"], 0, {}
    for group, wanted in example.groups.items():
        rows = slice(start, start + len(wanted) * each)
        right = torch.tensor([labels.index(w) for w in wanted.values() for _ in range(each)])
        start, found[group] = rows.stop, {}
        for column, images in pictures.items():
            seen = judge.probabilities(images[rows], "concept").argmax(1)
            change = (images[rows] - pictures["before"][rows]).square().mean((1, 2, 3)).sqrt()
            found[group][column] = float((seen == right).float().mean()), float(change.mean())
    return found


def table(name, found):
    columns = list(next(iter(found.values())))
    lines = [f"{name:<40}" + "".join(f"{column:>20}" for column in columns)]
    for group, cells in found.items():
        shown = [f"{right:.0%} ({change:.1%})" for right, change in cells.values()]
        lines.append(f"  {group:<38}" + "".join(f"{cell:>20}" for cell in shown))
    return "\n".join([*lines, "  right by the judge (change in pixels at equal seeds)", ""])


def picture(example, pictures, each):
    """A row for each prompt, with its first seed."""
    prompts = [prompt for group in example.groups.values() for prompt in group]
    rows = [
        (prompt, [to_image(images[i * each]) for images in pictures.values()])
        for i, prompt in enumerate(prompts)
    ]
    return labelled_grid(rows, list(pictures), side=80)


if __name__ == "__main__":
    main()
