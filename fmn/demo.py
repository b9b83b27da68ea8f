"""The main job on the demo model: forget three concepts, and show what that did."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from .concept import Concept
from .files import write_whole
from .hosts.diffusers import DiffusersModel
from .methods import resteer
from .patch import save_patch
from .pictures import beside, labelled_grid, to_image
from .probe import look_at

# Chosen by eye, on this model: a demonstration, not a measurement. A style is told by the words at
# a prompt's end, which the end token sums up, so its attention is taken too.
JOBS = (
    (
        Concept(
            "santa claus", "identity",
            prompts=("santa claus, noto emoji", "santa claus, twemoji", "3d render of santa claus"),
        ),
        resteer.Settings(),
    ),
    (
        Concept(
            "dog", "object",
            prompts=("a dog, noto emoji", "a dog, twemoji", "3d render of a dog"),
        ),
        resteer.Settings(),
    ),
    (
        Concept(
            "ink drawing", "style",
            prompts=("a cat, ink drawing", "an apple, ink drawing", "ink drawing of a car"),
        ),
        resteer.Settings(end_tokens="first"),
    ),
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
STEPS, GUIDANCE, SIDE = 12, 3.5, 128


def run_demo(folder):
    """Forget an identity, an object and a style; returns (data, text) for the command line.

    Writes three patches, ``grid.png`` and nothing else into ``folder``.
    """
    start, folder = time.monotonic(), Path(folder)
    model = DiffusersModel.load("demo")
    prompts = [prompt for prompts in FORGOTTEN.values() for prompt in prompts] + list(KEPT)
    before = _draw(model, prompts, "drawing before")
    attention_before = _attention(model)

    patches = [_train(model, *job) for job in JOBS]
    files = []
    for (concept, _), patch in zip(JOBS, patches):
        name = f"forget_{concept.name.replace(' ', '_')}.safetensors"
        files.append(save_patch(patch, folder / name))

    model.merged([(patch, 1.0) for patch in patches])
    attention_after = _attention(model)
    after = _draw(model, prompts, "drawing after")
    change = (after - before).square().mean((1, 2, 3)).sqrt().tolist()
    change = dict(zip(prompts, change))

    grid = folder / "grid.png"
    picture = _grid(prompts, before, after)
    write_whole(grid, lambda file: picture.save(file, format="PNG"))
    rows = [
        {
            "concept": concept.name,
            "kind": concept.kind,
            "attention before": attention_before[i].share,
            "attention after": attention_after[i].share,
            "picture change": _mean([change[prompt] for prompt in FORGOTTEN[concept.name]]),
        }
        for i, (concept, _) in enumerate(JOBS)
    ]
    result = {
        "forgotten": rows,
        "kept": {"prompts": len(KEPT), "picture change": _mean([change[p] for p in KEPT])},
        "patches": [str(file) for file in files],
        "grid": str(grid),
        "seconds": round(time.monotonic() - start, 1),
    }
    return result, _table(result)


def _train(model, concept, settings):
    with tqdm(total=settings.steps, desc=f"forgetting {concept.name}", unit="step") as bar:
        return resteer.run(model, [concept], settings, lambda step: bar.update())


def _attention(model):
    concepts = [concept for concept, _ in JOBS]
    return look_at(model, resteer.prepare(model, concepts, resteer.Settings()))


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
    return beside([labelled_grid(block, ["before", "after"], side=96) for block in blocks])


def _mean(values):
    return sum(values) / len(values)


def _table(result):
    lines = [
        f"{'concept':<14}{'kind':<10}{'attention':>18}{'picture change':>17}",
    ]
    for row in result["forgotten"]:
        attention = f"{row['attention before']:.2%} -> {row['attention after']:.2%}"
        lines.append(
            f"{row['concept']:<14}{row['kind']:<10}{attention:>18}{row['picture change']:>17.1%}"
        )
    kept = result["kept"]
    lines.append(f"{'everything else':<24}{'':>18}{kept['picture change']:>17.1%}")
    lines += [
        "",
        "attention: share that the concept's words get, mean over layers, heads and places",
        "picture change: root mean square difference of pixels at equal seeds; "
        f"everything else: {kept['prompts']} prompts",
        "",
        *(f"patch: {path}" for path in result["patches"]),
        f"pictures: {result['grid']}",
        f"done in {result['seconds']} s",
    ]
    return "\n".join(lines)
