"""``python -m fmn forget``: options, and what they set going."""

import re
from dataclasses import fields
from pathlib import Path

from ..concepts.concept import KINDS, parse_concept
from ..errors import ForgetError, NonFiniteLoss
from .options import add_method, given_settings

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def add_forget(commands, asked):
    """Add ``forget``; ``asked`` is the method whose settings it takes."""
    forget = commands.add_parser(
        "forget",
        help="make a patch",
        usage="%(prog)s MODEL CONCEPT ... [--method NAME] [--out FILE] [option ...]",
        description="Make a patch. Every setting of the chosen method is an option. A file that "
        "is there is never written over, unless --resume goes on with it.",
    )
    forget.add_argument("model", help="demo, a .safetensors checkpoint, or a diffusers folder")
    forget.add_argument(
        "concept",
        nargs="*",
        help="words to forget; KIND:WORDS sets a kind, WORDS -> ANCHOR what is drawn instead, e.g. "
        "'style:van gogh -> oil painting'",
    )
    forget.add_argument(
        "--list", type=Path, metavar="FILE", help="more concepts: lines, CSV, YAML or JSON"
    )
    forget.add_argument(
        "--kind", choices=KINDS, default="object", help="of concepts without one (%(default)s)"
    )
    forget.add_argument(
        "--out", type=Path, metavar="FILE",
        help="patch file (forget_NAME.safetensors, or a free number behind)",
    )  # fmt: skip
    forget.add_argument(
        "--alias", action="append", default=[], metavar="WORDS",
        help="another name; one concept only, several times if you like",
    )  # fmt: skip
    forget.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="another prompt with the concept in it; one concept only, several times if you like",
    )  # fmt: skip
    forget.add_argument(
        "--images", type=Path, metavar="FOLDER",
        help="reference pictures; one concept only, for methods that learn from pictures",
    )  # fmt: skip
    forget.add_argument(
        "--save-every", type=int, default=0, metavar="N",
        help="also save the patch, and what --resume needs, every N steps; for methods that train",
    )  # fmt: skip
    forget.add_argument(
        "--resume", type=Path, metavar="FILE",
        help="go on with a training that --save-every left: a patch, or the .fmn-train beside it",
    )  # fmt: skip
    forget.add_argument(
        "--keep-best", action="store_true",
        help="take the step with the lowest mean of the last 10 losses, not the last step; for "
        "methods that train",
    )  # fmt: skip
    add_method(forget, asked)


def run_forget(options):
    """Returns the result and its text."""
    from ..files import free_name
    from ..hosts.diffusers.model import DiffusersModel
    from ..methods import forget
    from ..methods.describe import describe
    from ..patches.patch import rescue, save_patch
    from ..training.resume import load_state
    from ..training.run import SaveEvery, TrainingOptions
    from .progress import Bar

    concepts = _concepts(options)
    settings = given_settings(options, concepts)
    _check_used(options, settings)
    state = _state_file(options.resume)
    path = _target(options, concepts, state)
    save = SaveEvery(options.save_every, lambda step: path.with_stem(f"{path.stem}_step{step}"))
    resume = load_state(state) if state else None
    model = DiffusersModel.load(options.model)
    training = TrainingOptions(resume, options.keep_best, save)
    with Bar() as bar:
        try:
            patch = forget(model, concepts, settings, bar, tuple(options.keep), training)
        except NonFiniteLoss as error:
            raise rescue(error, free_name(path.with_stem(f"{path.stem}_rescued"))) from error
    save_patch(patch, path)
    result = {"patch": str(path), "bytes": path.stat().st_size, "info": patch.info}
    return result, f"{describe(patch)}\nsaved: {path} ({path.stat().st_size / 1e6:.2f} MB)"


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
    from ..concepts.concept_list import read_concepts

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

    def upright(file):
        """As it is shown: cameras store how they were held."""
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")

    try:
        squares = [ImageOps.fit(upright(file), (side, side)) for file in files]
    except (OSError, Image.DecompressionBombError) as error:
        raise ForgetError(f"A picture in '{folder}' cannot be read: {error}") from error
    return torch.from_numpy(np.stack([np.asarray(square) for square in squares])).float() / 255


def _check_used(options, settings):
    """Refuse options that the method would not look at."""
    from ..methods import preset_of

    name = preset_of(settings)
    if options.save_every < 0:
        raise ForgetError(f"--save-every is {options.save_every}: use 0 (never) or more steps.")
    unused = {"--save-every": options.save_every, "--keep-best": options.keep_best}
    given = next((option for option, value in unused.items() if value), None)
    if given and not settings.trains:
        so_far = " without --robust-steps" if hasattr(settings, "robust_steps") else ""
        raise ForgetError(
            f"{given} is for methods that train, and {name} only solves{so_far}: leave it out."
        )
    if options.images and not hasattr(settings, "references"):
        raise ForgetError(
            f"--images is for methods that learn from pictures, such as resteer, and {name} does "
            "not: leave it out."
        )
    told = {each.name: each.metadata for each in fields(settings)}
    ways = told["references"]["choices"] if options.images else ()
    if "pictures" in ways and settings.references != "pictures":
        raise ForgetError(
            f"{name} draws pictures of its own and would not look at --images: add --references "
            "pictures, or leave it out."
        )


def _state_file(resume):
    """The file that a training goes on from, None for none; it is there."""
    from ..files import STATE_ENDING
    from ..training.resume import state_path

    if resume is None:
        return None
    state = state_path(resume)
    if not state.is_file():
        raise ForgetError(
            f"There is no saved training beside '{resume}' ({state.name}): --save-every N makes "
            f"one, with a patch NAME_stepN.safetensors; name the last of those, or "
            f"its {STATE_ENDING}."
        )
    return state


def _target(options, concepts, state):
    """The file to write. One that is there stays, unless it is of the training that goes on."""
    from ..files import STATE_ENDING, check_file, free_name
    from ..jobs.batch import NAME_LETTERS

    plain = "".join(c if c.isalnum() else "_" for c in concepts[0].name[:NAME_LETTERS])
    path = options.out or Path(f"forget_{plain}.safetensors")
    own = re.compile(rf"{re.escape(path.stem)}(_step\d+)?({STATE_ENDING}|\.safetensors)")
    goes_on = bool(
        state and own.fullmatch(state.name) and state.parent.resolve() == path.parent.resolve()
    )
    if not options.out and not goes_on:
        path = free_name(path)
    check_file(path, ".safetensors", goes_on)
    if options.save_every and not goes_on and path.parent.is_dir():
        left = sorted(file.name for file in path.parent.iterdir() if own.fullmatch(file.name))
        if left:
            raise ForgetError(
                f"'{left[0]}' is left from an earlier training: go on with --resume, or give "
                "another --out."
            )
    return path
