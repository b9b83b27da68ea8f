"""The command line: ``python -m fmn``."""

import argparse
import json
import os
import sys
from pathlib import Path

from . import __version__
from .batch_command import add_batch, add_merge, run_batch, run_merge
from .bench.command import add_bench, run_bench
from .concept import KINDS, parse_concept
from .errors import ForgetError, NonFiniteLoss
from .options import add_method, asked_method, given_settings
from .report import printable

OK, FAILED, BAD_INPUT, NOT_FINITE, PARTLY, CANCELLED = 0, 1, 2, 3, 4, 130

EPILOG = """\
MODEL is 'demo' (the small model that comes along), a Stable Diffusion 1.x, 2.x or XL checkpoint
(.safetensors), or a diffusers folder.

examples:
  python -m fmn demo
  python -m fmn forget demo "dog" --out dog.safetensors
  python -m fmn forget sd15.safetensors "style:van gogh" "identity:elon musk" --method uce
  python -m fmn apply demo dog.safetensors --prompt "a photo of a dog" --out dog.png
  python -m fmn apply sd15.safetensors a.safetensors b.safetensors:0.7 --checkpoint safe.safetensors
  python -m fmn inspect dog.safetensors --json
  python -m fmn batch list.csv --model sd15.safetensors --method uce --out patches
  python -m fmn merge "patches/*" dog.safetensors:0.8 --out all.safetensors --budget-kb 2000

exit codes: 0 done, 1 a fault of ours, 2 wrong input, 3 training blew up (the last good patch is
kept), 4 some concepts of a batch failed, 130 cancelled
"""


def build_parser(asked=None):
    """The parser of all commands; ``asked`` is the method whose settings ``forget`` takes."""
    parser = argparse.ArgumentParser(
        prog="python -m fmn",
        description="Make a text-to-image model forget a concept.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_forget(commands, asked)
    _add_apply(commands)
    add_batch(commands, asked)
    add_merge(commands)
    inspect = commands.add_parser("inspect", help="tell what a patch file forgets")
    inspect.add_argument("patch", type=Path)
    commands.add_parser("methods", help="list the methods")
    demo = commands.add_parser(
        "demo", help="forget an identity, an object and a style of the demo model, with pictures"
    )
    demo.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (%(default)s)")
    add_bench(commands, argparse.RawDescriptionHelpFormatter)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_forget(commands, asked):
    forget = commands.add_parser(
        "forget",
        help="train a patch",
        description="Make a patch. Every setting of the chosen method is an option.",
    )
    forget.add_argument("model", help="demo, a .safetensors checkpoint, or a diffusers folder")
    forget.add_argument(
        "concept",
        nargs="*",
        help="words to forget; KIND:WORDS sets a kind, WORDS -> ANCHOR what is drawn instead, e.g. "
        "'style:van gogh -> oil painting'",
    )
    forget.add_argument("--list", type=Path, help="file of more concepts: lines, CSV, YAML, JSON")
    forget.add_argument("--kind", choices=KINDS, default="object", help="kind of the others")
    forget.add_argument("--out", type=Path, help="patch file (forget_NAME.safetensors)")
    forget.add_argument(
        "--alias", action="append", default=[], help="another name; one concept only"
    )
    forget.add_argument("--prompt", action="append", default=[], help="another training prompt")
    forget.add_argument(
        "--images", type=Path, help="folder of reference pictures; one concept only"
    )
    forget.add_argument(
        "--save-every", type=int, default=0, metavar="N",
        help="also save the patch, and what --resume needs, every N steps of training",
    )  # fmt: skip
    forget.add_argument(
        "--resume", type=Path, metavar="FILE",
        help="go on with a training that --save-every left: a patch, or the .fmn-train beside it",
    )  # fmt: skip
    forget.add_argument(
        "--keep-best", action="store_true",
        help="take the step with the lowest mean of the last 10 losses, not the last step",
    )  # fmt: skip
    add_method(forget, asked)


def _add_apply(commands):
    apply = commands.add_parser("apply", help="draw with patches, or merge them into a checkpoint")
    apply.add_argument("model")
    apply.add_argument("patch", nargs="+", help="FILE or FILE:STRENGTH; strength is 1 unless given")
    result = apply.add_mutually_exclusive_group(required=True)
    result.add_argument(
        "--prompt", action="append", help="draw this; several make several pictures"
    )
    result.add_argument("--checkpoint", type=Path, help="write the merged model here")
    apply.add_argument("--out", type=Path, default=Path("picture.png"), help="(%(default)s)")
    apply.add_argument("--seed", type=int, default=0)
    apply.add_argument("--steps", type=int, default=20, help="sampling steps (%(default)s)")
    apply.add_argument("--guidance", type=float, help="guidance scale (7; demo 3.5)")
    apply.add_argument("--size", type=int, default=0, help="pixels a side; 0: the model's own")


def main(arguments=None):
    """Run a command; returns the exit code."""
    options = build_parser(asked_method(arguments)).parse_args(arguments)
    # transformers tells at import which image processors it would rather use.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands = {
        "forget": _forget, "apply": _apply, "inspect": _inspect, "demo": _demo, "methods": _methods,
        "batch": run_batch, "merge": run_merge,
    }  # fmt: skip
    run = (commands | {"bench": run_bench})[options.command]
    try:
        result, text, *partly = run(options)
    except NonFiniteLoss as error:
        return _fail(options, error, NOT_FINITE)
    except ForgetError as error:
        return _fail(options, error, BAD_INPUT)
    except KeyboardInterrupt:
        return _fail(options, "Cancelled; no unfinished file was left.", CANCELLED)
    print(json.dumps(result, indent=1) if options.json else text)
    return PARTLY if any(partly) else OK


def _fail(options, error, code):
    if options.json:
        print(json.dumps({"error": str(error)}))
    # A list or a patch can be a stranger's, whose control codes a terminal would obey.
    print("fmn: " + "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
    return code


def _concepts(options):
    named = [(text, options.kind) for text in options.concept]
    listed = _listed(options) if options.list else []
    if not named and not listed:
        raise ForgetError("There is nothing to forget: name a concept, or a --list of them.")
    more = {"aliases": tuple(options.alias), "prompts": tuple(options.prompt)}
    if not any((*more.values(), options.images)):
        return [parse_concept(*each) for each in named] + listed
    if len(named) + len(listed) > 1 or not named:
        raise ForgetError(
            "--alias, --prompt and --images belong to one concept, but "
            f"{len(named) + len(listed)} are named: run once for each."
        )
    if options.images:
        more["images"] = read_images(options.images)
    return [parse_concept(*named[0], **more)]


def _listed(options):
    from .concept_list import read_concepts

    return read_concepts(options.list, options.kind)


def read_images(folder):
    """All PNG, JPEG and WebP pictures of a folder, squared, [N, H, W, 3] in 0..1."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ForgetError(f"There are no pictures (PNG, JPEG, WebP) in '{folder}'.")
    side = 1024
    try:
        squares = [ImageOps.fit(Image.open(file).convert("RGB"), (side, side)) for file in files]
    except OSError as error:
        raise ForgetError(f"A picture in '{folder}' cannot be read: {error}") from error
    return torch.from_numpy(np.stack([np.asarray(square) for square in squares])).float() / 255


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def _methods(options):
    from .methods import METHODS, method

    about = {presets: method(presets[0]).ABOUT for presets in METHODS.values()}
    lines = [f"{', '.join(presets)}\n    {text}" for presets, text in about.items()]
    lines.append("\npython -m fmn forget --method NAME --help lists the settings of one")
    return {name: text for presets, text in about.items() for name in presets}, "\n".join(lines)


def _forget(options):
    from .bar import Bar
    from .hosts.diffusers import DiffusersModel
    from .methods import forget
    from .patch import rescue, save_patch
    from .report import describe
    from .resume import Saves, load_state, state_path
    from .supervisor import Supervisor

    concepts = _concepts(options)
    settings = given_settings(options, concepts)
    plain = "".join(letter if letter.isalnum() else "_" for letter in concepts[0].name)
    path = options.out or Path(f"forget_{plain}.safetensors")
    if options.save_every < 0:
        raise ForgetError(f"--save-every is {options.save_every}: use 0 (never) or more steps.")
    saves = Saves(options.save_every, lambda step: path.with_stem(f"{path.stem}_step{step}"))
    resume = load_state(state_path(options.resume)) if options.resume else None
    model = DiffusersModel.load(options.model)
    with Bar() as bar:

        def on_step(step):
            bar(step)
            saves(step)

        supervisor = Supervisor(on_step, resume, options.keep_best)
        try:
            patch = forget(model, concepts, settings, supervisor, tuple(options.keep))
        except NonFiniteLoss as error:
            raise rescue(error, path.with_stem(f"{path.stem}_rescued")) from error
    save_patch(patch, path)
    result = {"patch": str(path), "bytes": path.stat().st_size, "info": patch.info}
    return result, f"{describe(patch)}\nsaved: {path} ({path.stat().st_size / 1e6:.2f} MB)"


def _parse_patch(text):
    """FILE or FILE:STRENGTH."""
    from .files import file_and_strength
    from .patch import load_patch

    file, strength = file_and_strength(text)
    return load_patch(file), strength


def _apply(options):
    patches = [_parse_patch(text) for text in options.patch]
    if options.checkpoint:
        return _merge(options, patches)
    from .families import DEMO
    from .files import write_whole
    from .hosts.diffusers import DiffusersModel
    from .pictures import labelled_grid, to_image

    model = DiffusersModel.load(options.model).merged(patches)
    model.pipeline.set_progress_bar_config(disable=False, desc="drawing")
    size = options.size or model.family.resolution
    guidance = options.guidance
    if guidance is None:
        guidance = 3.5 if model.family is DEMO else 7.0
    noise = model.latents_like([options.seed] * len(options.prompt), size)
    pictures = model.decode(model.sample_latents(options.prompt, noise, options.steps, guidance))
    images = [to_image(picture) for picture in pictures]
    picture = images[0]
    if len(images) > 1:
        rows = [(prompt, [image]) for prompt, image in zip(options.prompt, images)]
        picture = labelled_grid(rows, [""], size)
    write_whole(options.out, lambda file: picture.save(file, format="PNG"))
    return {"picture": str(options.out)}, f"saved: {options.out}"


def _merge(options, patches):
    from .checkpoint import merge_into_checkpoint
    from .hosts.diffusers_load import DEMO_FILE

    source = DEMO_FILE if options.model == "demo" else Path(options.model)
    if options.checkpoint.exists():
        raise ForgetError(f"'{options.checkpoint}' exists already: name a new file or folder.")
    if source.is_dir():
        from .hosts.diffusers import DiffusersModel

        DiffusersModel.load(source).merged(patches).save(options.checkpoint)
    else:
        merge_into_checkpoint(source, patches, options.checkpoint)
    return {"checkpoint": str(options.checkpoint)}, f"saved: {options.checkpoint}"


def _inspect(options):
    from .patch import load_patch
    from .report import describe

    patch = load_patch(options.patch)
    result = {"family": patch.family.key, "layers": len(patch.changes), "ranks": patch.ranks}
    return result | {"info": patch.info}, describe(patch)


def _demo(options):
    from .demo import run_demo

    return run_demo(options.out)
