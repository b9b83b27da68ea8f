"""What guidance and gated patches cost a sampling step, and how well the gate tells prompts apart.

    COMFYUI_PATH=... python benchmarks/guidance.py cost [--model sd15 --size 512 --steps 4]
    python benchmarks/guidance.py gate

``cost`` samples in a real ComfyUI server on the CPU, each way in turn, and prints seconds a step
and the ratio to plain guidance of the same round: median over rounds. ``--model`` other than demo
makes a checkpoint with random weights first. ``gate`` takes the demo model's text encoder.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import monotonic

from random_checkpoint import make

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(1, str(ROOT))

OPEN, CLOSED = (-1.0, -0.99), (0.9999, 1.0)  # thresholds that leave no doubt
NAMED = {
    "santa claus": (
        "a photo of santa claus", "santa claus, twemoji", "a castle beside santa claus, pixel art",
        "mrs claus, twemoji", "a wizard, twemoji", "a christmas tree", "a castle, twemoji", "",
    ),
    "dog": (
        "a photo of a dog", "a dog, twemoji", "a castle and a dog, pixel art",
        "a drawing of a big dog in a garden", "a photo of a cat", "a fox", "a castle, twemoji", "",
    ),
    "ink drawing": (
        "a dog, ink drawing", "an ink drawing of a castle", "a dog, twemoji", "a photo of a dog",
        "a dog, black silhouette", "",
    ),
}  # fmt: skip
TEMPLATES = "a photo of {}", "{}, 3d render", "a picture of {} in the style of blob emoji"


def ways(node):
    """Nodes that lead to each model; the plain one is ["demo", 0]."""
    loaded = {"model": ["demo", 0], "clip": ["demo", 1]}
    safe = {
        name: node("FMN_SafeLatentDiffusion", **loaded, text="dog", preset="custom", warmup=warmup,
                   scale=1000.0, threshold=0.01, momentum_scale=momentum, momentum_beta=0.4)
        for name, warmup, momentum in (("safe", 0, 0.3), ("safe, warming up", 10000, 0.0))
    }  # fmt: skip
    patch = {"patch": ["train", 0], "strength": 1.0}
    gates = {
        f"gated patch, {label}": node("FMN_ApplyGatedPatch", **loaded, **patch, low=low, high=high)
        for label, (low, high) in (("open", OPEN), ("closed", CLOSED))
    }
    negative = node("FMN_EraseByNegativePrompt", **loaded, text="dog", mode="replace")
    merged = node("FMN_ApplyForgetPatch", model=["demo", 0], patch=["train", 0], strength=1.0)
    return safe | {"negative prompt": negative} | gates | {"merged patch": merged}


def seconds_a_step(server, prompt):
    """From the first reported step to the last; loading and encoding lie before."""
    prompt_id = server.queue(prompt)
    moments = [monotonic() for kind, _ in server.events(prompt_id) if kind == "progress"]
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def cost(options):
    from comfyui.conftest import make_base
    from comfyui.server import Server
    from comfyui.workflows import checkpoint_loader, demo_loader, drawing, node, training

    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        load = demo_loader()
        if options.model != "demo":
            checkpoint = base / "models" / "checkpoints" / f"{options.model}.safetensors"
            make(options.model, checkpoint)
            load = checkpoint_loader(checkpoint.name)
        models = {"plain": None} | ways(node)
        seconds = {name: [] for name in models}
        with Server(os.environ["COMFYUI_PATH"], base, "--disable-metadata") as server:
            server.run(load | training(steps=1, size=64) | drawing(steps=1, size=64))
            for round_ in range(options.rounds):
                for name, way in models.items():
                    model = ["demo", 0] if way is None else ["way", 0]
                    nodes = {} if way is None else training(steps=1, size=64) | {"way": way}
                    more = {"seed": round_, "steps": options.steps, "size": options.size}
                    prompt = load | nodes | drawing(model, "a photo of a castle", **more)
                    seconds[name].append(seconds_a_step(server, prompt))
        print(
            f"{options.model}, {options.size} px, cfg 3.5, batch 1, {options.steps} steps, "
            f"median of {options.rounds} rounds, {os.cpu_count()} CPUs"
        )
        for name, found in seconds.items():
            ratio = median(a / b for a, b in zip(found, seconds["plain"]))
            print(f"{name:<22}{median(found):>10.4f} s/step {ratio:>8.2f} x")


def gate_of(model, name, kind):
    from fmn.guidance.prompt_gate import patch_gate
    from fmn.patches.patch import ForgetPatch

    record = {"name": name, "kind": kind, "aliases": []}
    return patch_gate(model, ForgetPatch(model.family, {}, {"concepts": [record]}))


def gate(options):
    import torch

    from fmn.bench.suite import load_suite
    from fmn.guidance.prompt_gate import HIGH, LOW
    from fmn.hosts.diffusers.model import DiffusersModel

    model = DiffusersModel.load("demo")
    print(f"closeness and gate, thresholds {LOW} and {HIGH}")
    for name, prompts in NAMED.items():
        found = gate_of(model, name, "style" if name == "ink drawing" else "object")
        contexts = model.encode_all(prompts)
        for prompt, near, part in zip(prompts, found.closeness(contexts), found(contexts)):
            print(f"{name:<13}{prompt or '(empty)':<40}{near:>7.2f}{part:>7.2f}")

    suite = load_suite("demo")
    phrases = suite.concepts
    texts = [line.format(phrase) for phrase in phrases.values() for line in TEMPLATES]
    contexts = model.encode_all(texts)
    own, others = [], []
    for index, name in enumerate(phrases):
        amount = gate_of(model, name, suite.kinds[name])(contexts).view(
            len(phrases), len(TEMPLATES)
        )
        own.append(amount[index])
        others.append(torch.cat([amount[:index], amount[index + 1 :]]))
    print(f"{len(phrases)} concepts of the demo model, {len(TEMPLATES)} prompts each")
    for label, parts in (("its own prompts", own), ("all other prompts", others)):
        parts = torch.cat([part.flatten() for part in parts])
        print(
            f"{label:<20}mean gate {parts.mean():.2f}, closed {(parts == 0).float().mean():.0%}, "
            f"open {(parts == 1).float().mean():.0%}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("cost")
    command.add_argument("--model", default="demo", help="demo, sd15, sd21 or sdxl (demo)")
    command.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    command.add_argument("--steps", type=int, default=40, help="sampling steps (40)")
    command.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    command.set_defaults(run=cost)
    commands.add_parser("gate").set_defaults(run=gate)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
