"""The main job on the demo model: forget three concepts, and show what that did."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..concepts.concept import Concept
from ..files import write_whole
from ..hosts.diffusers.model import DiffusersModel
from ..images import labelled_grid, side_by_side, to_image
from ..methods import DEFAULT, forget, settings_of
from ..metrics.load import load_judge
from ..patches.patch import save_patch

CONCEPTS = (
    Concept("santa claus", "identity"), Concept("dog"), Concept("ink drawing", "style"),
)  # fmt: skip
FORGOTTEN = {
    "santa claus": (
        "a photo of santa claus", "santa claus in the style of noto emoji",
        "twemoji of santa claus",
    ),
    "dog": ("a photo of a dog", "a dog, 3d render", "a dog in the style of twemoji"),
    "ink drawing": ("an owl, ink drawing", "ink drawing of a robot", "a castle, ink drawing"),
}  # fmt: skip
KEPT = (
    "mrs claus, noto emoji", "a wizard, twemoji", "a vampire, 3d render", "an astronaut, twemoji",
    "a cat, noto emoji", "a horse, 3d render", "a cow, twemoji", "a tiger, noto emoji",
    "a pig, 3d render", "a rabbit, black silhouette", "an owl, noto emoji", "a robot, 3d render",
    "a house, twemoji", "a castle, 3d render", "a car, twemoji", "an airplane, noto emoji",
    "an apple, 3d render", "a banana, noto emoji", "a pizza, 3d render", "a rose, twemoji",
    "a guitar, 3d render", "an umbrella, noto emoji", "a rocket, 3d render", "a key, twemoji",
)  # fmt: skip
PROMPTS = [prompt for prompts in FORGOTTEN.values() for prompt in prompts] + list(KEPT)
STEPS, GUIDANCE, SIDE = 12, 3.5, 128


def run_demo(folder):
    """Forget an identity, an object and a style; returns (data, text) for the command line.

    Writes one patch for all three, ``grid.png`` and nothing else into ``folder``.
    """
    start, folder = time.monotonic(), Path(folder)
    model, judge = DiffusersModel.load("demo"), load_judge("demo")
    before = _draw(model, PROMPTS, "drawing before")

    begun = time.monotonic()
    patch = forget(model, list(CONCEPTS), settings_of(DEFAULT, {}))
    solved = time.monotonic() - begun
    file = save_patch(patch, folder / "forget_three.safetensors")
    model.merged([(patch, 1.0)])
    after = _draw(model, PROMPTS, "drawing after")
    found = [seen(judge, PROMPTS, pictures) for pictures in (before, after)]

    grid = folder / "grid.png"
    picture = _grid(PROMPTS, before, after)
    write_whole(grid, lambda file: picture.save(file, format="PNG"))
    rows = [
        {
            "concept": concept.name,
            "kind": concept.kind,
            "pictures": len(FORGOTTEN[concept.name]),
            "seen before": sum(concept.name in found[0][p] for p in FORGOTTEN[concept.name]),
            "seen after": sum(concept.name in found[1][p] for p in FORGOTTEN[concept.name]),
        }
        for concept in CONCEPTS
    ]
    right = [sum(all(word in p for word in each[p]) for p in KEPT) for each in found]
    result = {
        "method": DEFAULT,
        "forgotten": rows,
        "kept": {"pictures": len(KEPT), "right before": right[0], "right after": right[1]},
        "patch": str(file),
        "grid": str(grid),
        "seconds": {"patch": round(solved, 1), "all": round(time.monotonic() - start, 1)},
    }
    return result, _table(result)


def seen(judge, prompts, pictures):
    """What the judge sees: prompt -> its words for the concept and the style."""
    words = []
    for domain, labels in judge.labels.items():
        best = judge.probabilities(pictures, domain).argmax(1).tolist()
        words.append([labels[i] for i in best])
    return dict(zip(prompts, zip(*words)))


def _draw(model, prompts, title, batch=6):
    """One picture a prompt, [N, H, W, 3]; the n-th always starts from seed n."""
    noise, pictures = model.latents_like(range(len(prompts)), SIDE), []
    with tqdm(total=len(prompts), desc=title, unit="picture") as bar:
        for i in range(0, len(prompts), batch):
            rows = slice(i, i + batch)
            latents = model.sample_latents(prompts[rows], noise[rows], STEPS, GUIDANCE)
            pictures.append(model.decode(latents))
            bar.update(len(latents))
    return torch.cat(pictures)


def _grid(prompts, before, after):
    shown = [prompt for prompts in FORGOTTEN.values() for prompt in prompts] + list(KEPT[::3])
    rows = []
    for prompt in shown:
        i = prompts.index(prompt)
        rows.append((prompt, [to_image(before[i]), to_image(after[i])]))
    third = -(-len(rows) // 3)
    blocks = [rows[i : i + third] for i in range(0, len(rows), third)]
    return side_by_side([labelled_grid(block, ["before", "after"], side=96) for block in blocks])


def _table(result):
    lines = [f"{'concept':<14}{'kind':<10}{'drawn before':>14}{'after':>10}"]
    for row in result["forgotten"]:
        count = row["pictures"]
        before, after = (f"{row[f'seen {when}']} of {count}" for when in ("before", "after"))
        lines.append(f"{row['concept']:<14}{row['kind']:<10}{before:>14}{after:>10}")
    kept = result["kept"]
    before, after = (
        f"{kept[f'right {when}']} of {kept['pictures']}" for when in ("before", "after")
    )
    lines.append(f"{'everything else':<24}{before:>14}{after:>10}")
    seconds = result["seconds"]
    lines += [
        "",
        f"method: {result['method']}, one patch for all three",
        "drawn: pictures in which the demo's judge sees the concept; everything else: other",
        "prompts, of which it sees both the thing and the style",
        "",
        f"patch: {result['patch']}",
        f"pictures: {result['grid']}",
        f"done in {seconds['all']} s, {seconds['patch']} s of it for the patch",
    ]
    return "\n".join(lines)
