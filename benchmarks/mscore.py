"""M-Score of the demo model before and after forgetting: the numbers of docs/mscore.md.

    python benchmarks/mscore.py --out out/mscore

For an identity, an object and a style it trains a re-steering patch, learns words from pictures
of the concept on the untouched model, on the forgetful one, and on one that forgot something
else, and prints how close those words are to the concept's name. Writes a table and a grid.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fmn.concepts.concept import Concept
from fmn.concepts.prompt_templates import PLACEHOLDER
from fmn.files import write_whole
from fmn.hosts.diffusers.model import DiffusersModel
from fmn.images import labelled_grid, to_image
from fmn.methods import resteer
from fmn.metrics.mscore import m_score, summary
from fmn.models.image_sampler import open_sampler
from fmn.models.interface import Text
from fmn.models.sampling import Sampling
from fmn.training.textual_inversion import Settings

STYLES = "noto emoji", "blob emoji", "twemoji", "3d render", "pixel art", "black silhouette"
# name -> how prompts call it, templates, what to draw of it, whose patch is the control's
TARGETS = {
    "santa claus": ("santa claus", ("a photo of {}",), [f"{{}}, {s}" for s in STYLES], "dog"),
    "dog": ("a dog", ("a photo of {}",), [f"{{}}, {s}" for s in STYLES], "santa claus"),
    # One thing only, named in the template: else words for the thing are learned as well.
    "ink drawing": ("ink drawing", ("a cat, {}",), ["a cat, {}"] * len(STYLES), "dog"),
}  # fmt: skip
OTHERS = {
    "santa claus": ("mrs claus", "a wizard", "a castle"),
    "dog": ("a cat", "a horse", "a castle"),
    "ink drawing": ("black silhouette", "noto emoji", "3d render"),
}
EACH = 2  # pictures a prompt
JOBS = (
    (Concept("santa claus", "identity", prompts=(
        "santa claus, noto emoji", "santa claus, twemoji", "3d render of santa claus",
    )), resteer.Settings()),
    (Concept("dog", prompts=("a dog, noto emoji", "a dog, twemoji", "3d render of a dog")),
     resteer.Settings()),
    # A style is named by the words at a prompt's end, which the end token sums up.
    (Concept("ink drawing", "style", prompts=(
        "a cat, ink drawing", "an apple, ink drawing", "ink drawing of a car",
    )), resteer.Settings(end_tokens="first")),
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/mscore", help="folder for mscore.json and grid.png")
    parser.add_argument("--seeds", type=int, default=3, help="inversions a model (default 3)")
    for name in ("steps", "lr", "batch", "tokens"):
        default = getattr(Settings(), name)
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"of an inversion ({default})"
        )
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    model = DiffusersModel.load("demo", "cpu")
    patches = {concept.name: resteer.run(model, [concept], how) for concept, how in JOBS}
    settings = Settings(
        steps=options.steps, lr=options.lr, batch=options.batch, tokens=options.tokens
    )
    seeds = range(options.seeds)
    found, rows = {}, []
    with open_sampler(model, Sampling(12, 3.5)) as sampler:
        for name in options.targets:
            found[name], pictures = measured(sampler, name, patches, seeds, settings)
            rows += pictures
            print(table(name, found[name]), flush=True)
    result = {"settings": asdict(settings), "seeds": options.seeds, "targets": found}
    text = json.dumps(result, indent=1)
    write_whole(Path(options.out, "mscore.json"), lambda path: path.write_text(text, "utf-8"))
    grid = labelled_grid(rows, [f"{i + 1}" for i in range(len(STYLES))], side=96)
    write_whole(Path(options.out, "grid.png"), lambda path: grid.save(path, format="PNG"))


def measured(sampler, name, patches, seeds, settings):
    """M of a target on three models, and rows of pictures with the learned words."""
    phrase, templates, prompts, other = TARGETS[name]
    named = [prompt.format(phrase) for prompt in prompts]
    images = sampler.draw(named * EACH, range(100, 100 + EACH * len(named)))
    given = images, phrase, templates, seeds, settings, OTHERS[name]
    rows = [(f"{name}: references", images[: len(named)])]
    scores = {}
    patches_by_row = {
        "untouched": [],
        "forgot it": [(patches[name], 1.0)],
        "control": [(patches[other], 1.0)],
    }
    for title, patch in patches_by_row.items():
        with sampler.applying(patch):
            scores[title] = m_score(sampler.model, sampler.denoiser, *given)
            rows.append((f"{title}: name", sampler.draw(named, range(len(named)))))
            learned = drawn(sampler, prompts, scores[title][0].vectors)
            rows.append((f"{title}: learned words", learned))
    both = {
        title: summary(sampler.model, scores["untouched"], scores[title], phrase, templates)
        for title in ("forgot it", "control")
    }
    return both, [(label, [to_image(p) for p in pictures]) for label, pictures in rows]


def drawn(sampler, prompts, vectors):
    with sampler.model.borrow_text_encoder() as text, torch.no_grad():
        encoded = [text.encode(prompt.format(PLACEHOLDER), vectors)[0] for prompt in prompts]
    return sampler.draw_texts(Text.cat(encoded), range(len(prompts)))


def table(name, found):
    forgot, control = found["forgot it"], found["control"]
    lines = [f"{name}"]
    for title, values in (
        ("random words (start)", forgot["start"]),
        ("untouched", forgot["before"]),
        ("forgot it", forgot["after"]),
        ("forgot another (control)", control["after"]),
    ):
        each = " ".join(f"{value:.3f}" for value in values)
        spread = stdev(values) if len(values) > 1 else 0.0
        lines.append(f"  {title:<26}{mean(values):.3f} +- {spread:.3f}   ({each})")
    for other, value in forgot["between"].items():
        to_other = forgot["others"][other]
        lines.append(
            f"  against {other:<18}{value:.3f} for the name, {mean(to_other['before']):.3f} for "
            f"words of untouched, {mean(to_other['after']):.3f} of forgetful"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
