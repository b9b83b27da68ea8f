"""``python -m fmn forget``."""

import re
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..concepts.concept import Concept, parse_concept
from ..errors import ForgetError, NonFiniteLoss
from ..settings import Settings
from .options import (
    MODEL,
    Commands,
    add_command,
    add_kind,
    add_method,
    add_model_options,
    add_repeated,
    given_settings,
    load_model,
)

if TYPE_CHECKING:  # these load torch, which --help does not need
    import torch

SIDE = 1024  # pixels of a reference picture


def add_forget(commands: Commands, asked: str | None) -> None:
    """Add ``forget``; ``asked`` is the method whose settings it takes."""
    forget = add_command(
        commands, "forget", run_forget, "make a patch",
        usage="%(prog)s MODEL CONCEPT ... [--method NAME] [--out FILE] [option ...]",
        description="Make a patch. Every setting of the chosen method is an option. Existing "
        "files are never overwritten, unless --resume continues their training.",
    )  # fmt: skip
    forget.add_argument("model", help=MODEL)
    forget.add_argument(
        "concept", nargs="*",
        help="words to forget; KIND:WORDS sets a kind, WORDS -> ANCHOR what is drawn instead, e.g. "
        "'style:van gogh -> oil painting'",
    )  # fmt: skip
    forget.add_argument(
        "--list", type=Path, metavar="FILE", help="more concepts: lines, CSV, YAML or JSON"
    )
    add_kind(forget)
    forget.add_argument(
        "--out", type=Path, metavar="FILE",
        help="patch file (forget_NAME.safetensors; a number is appended if it exists)",
    )  # fmt: skip
    add_repeated(forget, "--alias", "another name, for one concept only", metavar="WORDS")
    add_repeated(forget, "--prompt", "another prompt that contains the one concept", metavar="TEXT")
    forget.add_argument(
        "--images", type=Path, metavar="FOLDER",
        help="reference pictures of the one concept, for methods that learn from pictures",
    )  # fmt: skip
    forget.add_argument(
        "--save-every", type=int, default=0, metavar="N",
        help="also save the patch and its training state every N steps; for methods that train",
    )  # fmt: skip
    forget.add_argument(
        "--resume", type=Path, metavar="FILE",
        help="continue a training that --save-every saved: a patch, or the .fmn-train beside it",
    )  # fmt: skip
    forget.add_argument(
        "--keep-best", action="store_true",
        help="keep the step with the lowest mean of the last 10 losses, not the last step; for "
        "methods that train",
    )  # fmt: skip
    add_model_options(forget)
    add_method(forget, asked)


def run_forget(options: Namespace) -> tuple[dict[str, Any], str]:
    """Returns the result and its text."""
    from ..files import free_name
    from ..methods import forget
    from ..methods.describe import describe
    from ..metrics.neighbours import neighbours
    from ..metrics.outcome import in_words, outcomes
    from ..patches.padding import lost_elsewhere
    from ..patches.patch import rescue, save_patch
    from ..training.resume import load_state
    from ..training.run import SaveEvery, TrainingOptions
    from .progress import StepBar

    concepts = _concepts(options)
    settings = given_settings(options, concepts)
    _check_used(options, settings)
    state = _state_file(options.resume)
    path = _target(options, concepts, state)
    save = SaveEvery(options.save_every, lambda step: path.with_stem(f"{path.stem}_step{step}"))
    resume = load_state(state) if state else None
    model = load_model(options)
    if options.images:
        model.need_vae()
    training = TrainingOptions(resume, options.keep_best, save)
    near = neighbours(model, concepts, settings, tuple(options.keep))
    for each in near:
        print(each, file=sys.stderr)
    with StepBar() as bar:
        try:
            patch = forget(model, concepts, settings, bar, tuple(options.keep), training)
        except NonFiniteLoss as error:
            raise rescue(error, free_name(path.with_stem(f"{path.stem}_rescued"))) from error
    save_patch(patch, path)
    size = path.stat().st_size
    found = outcomes(model, patch, concepts, near)  # the patch is saved already
    outcome = [each._asdict() for each in found]
    result = {
        "patch": str(path),
        "bytes": size,
        "info": patch.info,
        "outcome": outcome,
        "near": [each._asdict() for each in near],
    }
    lines = [
        describe(patch),
        *lost_elsewhere(patch.family, patch.changes),
        *in_words(found, concepts),
    ]
    return result, "\n".join([*lines, f"saved: {path} ({size / 1e6:.2f} MB)"])


def _concepts(options: Namespace) -> list[Concept]:
    named = [(text, options.kind) for text in options.concept]
    listed = _listed(options) if options.list else []
    if not named and not listed:
        raise ForgetError("There is nothing to forget: name a concept, or a --list of them.")
    more: dict[str, Any] = {"aliases": tuple(options.alias), "prompts": tuple(options.prompt)}
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


def _listed(options: Namespace) -> list[Concept]:
    from ..concepts.concept_list import read_concepts

    return read_concepts(options.list, options.kind)


def read_images(folder: str | Path) -> "torch.Tensor":
    """All PNG, JPEG and WebP pictures of a folder, cropped to squares: [N, H, W, 3] in 0..1."""
    import numpy as np
    import torch

    from ..images import picture_files, read_picture

    squares = [np.asarray(read_picture(file, SIDE)) for file in picture_files(folder)]
    return torch.from_numpy(np.stack(squares)).float() / 255


def _check_used(options: Namespace, settings: Settings) -> None:
    """Refuse options that the method ignores."""
    from ..methods import preset_of

    name, settable = preset_of(settings), {each.name: each for each in fields(settings)}
    if options.save_every < 0:
        raise ForgetError(f"--save-every is {options.save_every}: use 0 (never) or more steps.")
    needs_training = {"--save-every": options.save_every, "--keep-best": options.keep_best}
    unused = next((option for option, value in needs_training.items() if value), None)
    if unused and not settings.trains:
        as_set = " without --robust-steps" if "robust_steps" in settable else ""
        raise ForgetError(
            f"{unused} is for methods that train, and {name} only solves{as_set}: leave it out."
        )
    if not options.images:
        return
    if "references" not in settable:
        raise ForgetError(
            f"--images is for methods that learn from pictures, such as resteer, and {name} does "
            "not: leave it out."
        )
    choices = settable["references"].metadata["choices"]
    if "pictures" in choices and vars(settings)["references"] != "pictures":
        raise ForgetError(
            f"{name} samples its own pictures and ignores --images: add --references pictures, or "
            "leave it out."
        )


def _state_file(resume: Path | None) -> Path | None:
    """The file of the training state to resume from; None for none."""
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


def _target(options: Namespace, concepts: list[Concept], state: Path | None) -> Path:
    """The file to write. It may exist if it is of the training that is resumed."""
    from ..files import STATE_ENDING, check_file, free_name
    from ..jobs.batch import plain_name

    path = options.out or Path(f"forget_{plain_name(concepts[0])}.safetensors")
    of_training = re.compile(rf"{re.escape(path.stem)}(_step\d+)?({STATE_ENDING}|\.safetensors)")
    continues = bool(
        state
        and of_training.fullmatch(state.name)
        and state.parent.resolve() == path.parent.resolve()
    )
    if not options.out and not continues:
        path = free_name(path)
    check_file(path, ".safetensors", continues)
    if options.save_every and not continues and path.parent.is_dir():
        left = sorted(p.name for p in path.parent.iterdir() if of_training.fullmatch(p.name))
        if left:
            raise ForgetError(
                f"'{left[0]}' is left from an earlier training: continue it with --resume, or "
                "give another --out."
            )
    return path
