"""The demo: forget three concepts of the demo model, and show what that did."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..concepts.concept import Concept
from ..files import write_whole
from ..hosts.diffusers.open import open_model
from ..hosts.diffusers.pipeline_model import PipelineModel
from ..images import labelled_grid, side_by_side, to_image
from ..methods import DEFAULT, forget, settings_of
from ..metrics.judge import Judge
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


def run_demo(folder: str | Path) -> tuple[dict[str, Any], str]:
    """Forget an identity, an object and a style; returns (data, text) for the command line.

    Writes one patch for all three, ``grid.png`` and nothing else into ``folder``.
    """
    start, folder = time.monotonic(), Path(folder)
    model, judge = open_model("demo"), load_judge("demo")
    before = _draw(model, PROMPTS, "drawing before")
    solving = time.monotonic()
    patch = forget(model, list(CONCEPTS), settings_of(DEFAULT, {}))
    solved = time.monotonic() - solving
    file = save_patch(patch, folder / "forget_three.safetensors")
    model.add_patches([(patch, 1.0)])
    after = _draw(model, PROMPTS, "drawing after")
    labels = [judge_labels(judge, PROMPTS, images) for images in (before, after)]

    grid = folder / "grid.png"
    picture = _grid(before, after)
    write_whole(grid, lambda file: picture.save(file, format="PNG"))
    rows = [
        {
            "concept": concept.name,
            "kind": concept.kind,
            "pictures": len(prompts),
            "seen before": sum(concept.name in labels[0][prompt] for prompt in prompts),
            "seen after": sum(concept.name in labels[1][prompt] for prompt in prompts),
        }
        for concept in CONCEPTS
        for prompts in [FORGOTTEN[concept.name]]
    ]
    right = [sum(all(word in p for word in words[p]) for p in KEPT) for words in labels]
    result = {
        "method": DEFAULT,
        "forgotten": rows,
        "kept": {"pictures": len(KEPT), "right before": right[0], "right after": right[1]},
        "patch": str(file),
        "grid": str(grid),
        "seconds": {"patch": round(solved, 1), "all": round(time.monotonic() - start, 1)},
    }
    return result, _table(result)


def judge_labels(
    judge: Judge, prompts: Sequence[str], images: torch.Tensor
) -> dict[str, tuple[str, ...]]:
    """Each prompt's likeliest label in every domain of the judge; images [N, H, W, 3]."""
    columns = [
        [labels[i] for i in judge.probabilities(images, domain).argmax(1).tolist()]
        for domain, labels in judge.labels.items()
    ]
    return dict(zip(prompts, zip(*columns)))


def _draw(
    model: PipelineModel[Any], prompts: list[str], title: str, batch: int = 6
) -> torch.Tensor:
    """One picture for each prompt, [N, H, W, 3]; the n-th starts from seed n."""
    noise, images = model.initial_noise(range(len(prompts)), SIDE), []
    with tqdm(total=len(prompts), desc=title, unit="picture") as bar:
        for i in range(0, len(prompts), batch):
            rows = slice(i, i + batch)
            latents = model.sample_latents(prompts[rows], noise[rows], STEPS, GUIDANCE)
            images.append(model.decode(latents))
            bar.update(len(latents))
    return torch.cat(images)


def _grid(before: Iterable[torch.Tensor], after: Iterable[torch.Tensor]) -> Image.Image:
    pairs = dict(zip(PROMPTS, zip(before, after)))
    shown = [prompt for prompts in FORGOTTEN.values() for prompt in prompts] + list(KEPT[::3])
    rows = [(prompt, [to_image(image) for image in pairs[prompt]]) for prompt in shown]
    third = -(-len(rows) // 3)
    blocks = [rows[i : i + third] for i in range(0, len(rows), third)]
    return side_by_side([labelled_grid(block, ["before", "after"], side=96) for block in blocks])


def _table(result: dict[str, Any]) -> str:
    def counts(row: dict[str, Any], word: str) -> str:
        shares = [f"{row[f'{word} {when}']} of {row['pictures']}" for when in ("before", "after")]
        return f"{shares[0]:>14}{shares[1]:>10}"

    lines = [f"{'concept':<14}{'kind':<10}{'drawn before':>14}{'after':>10}"]
    for row in result["forgotten"]:
        lines.append(f"{row['concept']:<14}{row['kind']:<10}{counts(row, 'seen')}")
    seconds = result["seconds"]
    lines += [
        f"{'everything else':<24}{counts(result['kept'], 'right')}",
        "",
        f"method: {result['method']}, one patch for all three",
        "drawn: pictures in which the demo's judge sees the concept; everything else: other",
        "prompts, of which it sees both the thing and the style",
        "",
        f"patch: {result['patch']}",
        f"pictures: {result['grid']}",
        f"done in {seconds['all']} s, of which {seconds['patch']} s for the patch",
    ]
    return "\n".join(lines)
