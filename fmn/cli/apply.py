"""``python -m fmn apply``."""

import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..concepts.concept import Prompt
from ..concepts.prompt_syntax import prompt_text
from ..errors import ForgetError
from ..settings import MAX_SEED, Settings, setting
from .options import (
    MODEL,
    Commands,
    add_command,
    add_model_options,
    add_repeated,
    add_settings,
    given_options,
    load_model,
)

if TYPE_CHECKING:  # loads torch, which --help does not need
    from ..patches.patch import ForgetPatch

PICTURE = Path("picture.png")
DEMO_GUIDANCE = 3.5


@dataclass(frozen=True)
class Drawing(Settings):
    """How pictures are sampled."""

    steps: int = setting(20, "Sampling steps.", limits=(1, 1000))
    guidance: float = setting(
        7.0,
        f"Guidance scale. 1: none. For the demo models the default is {DEMO_GUIDANCE}.",
        limits=(0.0, 100.0),
    )
    size: int = setting(0, "Pixels a side. 0: what the model was made for.", limits=(0, 4096, 64))
    seed: int = setting(0, "Same seed, same picture.", limits=(0, MAX_SEED))


def add_apply(commands: Commands) -> None:
    """Add ``apply``."""
    apply = add_command(
        commands, "apply", run_apply, "draw with patches, or merge them into a checkpoint",
        description="Draw with patches on a model, or save the model with the patches merged into "
        "its weights. Existing files are never overwritten.",
    )  # fmt: skip
    apply.add_argument("model", help=MODEL)
    apply.add_argument("patch", nargs="+", help="FILE or FILE:STRENGTH; strength is 1 unless given")
    result = apply.add_mutually_exclusive_group(required=True)
    add_repeated(
        result, "--prompt", "draw this, as a row of the picture", metavar="TEXT", default=None
    )
    result.add_argument(
        "--checkpoint", type=Path, metavar="NEW",
        help="save the merged model: a .safetensors file, or a folder if MODEL is one",
    )  # fmt: skip
    drawing = apply.add_argument_group("with --prompt")
    drawing.add_argument(
        "--out",
        type=Path,
        metavar="PNG",
        help=f"the picture ({PICTURE}; with a number if it exists)",
    )
    add_model_options(drawing)
    add_settings(drawing, Drawing())


def run_apply(options: Namespace) -> tuple[dict[str, str], str]:
    """Returns the result and its text."""
    given = given_options(options)
    if not options.checkpoint:
        return _draw(options, Drawing(**given), "guidance" in given)
    names = "out", "vae", "prediction"
    unused = next(iter(given), next((name for name in names if getattr(options, name)), None))
    if unused:
        raise ForgetError(
            f"--{unused} is for drawing, and --checkpoint draws nothing: leave one out."
        )
    return _merge(options)


def _patches(options: Namespace) -> list[tuple["ForgetPatch", float]]:
    from ..files import file_and_strength
    from ..patches.metadata import CHANGED
    from ..patches.patch import load_patch

    files = [file_and_strength(text) for text in options.patch]
    patches = [(load_patch(file), strength) for file, strength in files]
    for patch, _ in patches:
        if patch.info.get("changed") and patch.source:
            print(f"{patch.source.path.name}: {CHANGED}", file=sys.stderr)
    return patches


def _draw(options: Namespace, drawing: Drawing, guided: bool) -> tuple[dict[str, str], str]:
    from ..files import check_file, free_name, write_whole
    from ..images import labelled_grid, to_image

    prompts = [Prompt(prompt_text(text), text, plain=False) for text in options.prompt]
    out = options.out or free_name(PICTURE)
    check_file(out, ".png")
    patches = _patches(options)
    model = load_model(options)
    model.need_vae()
    model.add_patches(patches)
    model.pipeline.set_progress_bar_config(disable=False, desc="drawing")
    if model.is_demo and not guided:
        drawing = replace(drawing, guidance=DEMO_GUIDANCE)
    size = drawing.size or model.family.resolution
    noise = model.initial_noise([drawing.seed] * len(prompts), size)
    latents = model.sample_latents(prompts, noise, drawing.steps, drawing.guidance)
    images = [to_image(image) for image in model.decode(latents)]
    picture = images[0]
    if len(images) > 1:
        rows = [(prompt.text, [image]) for prompt, image in zip(prompts, images)]
        picture = labelled_grid(rows, [""], size)
    write_whole(out, lambda file: picture.save(file, format="PNG"))
    return {"picture": str(out)}, f"saved: {out}"


def _merge(options: Namespace) -> tuple[dict[str, str], str]:
    from ..files import check_file, check_new
    from ..hosts.diffusers.load import DEMO_FILE
    from ..hosts.diffusers.model import DiffusersModel
    from ..patches.checkpoint import merge_into_checkpoint

    if options.model == "demo-dit":
        raise ForgetError(
            "--checkpoint merges into the weights of Stable Diffusion, and demo-dit is a "
            "transformer: keep the patch, and draw with it by --prompt."
        )
    source = DEMO_FILE if options.model == "demo" else Path(options.model)
    target = options.checkpoint
    if source.is_dir():
        if target.suffix.lower() in (".safetensors", ".ckpt"):
            raise ForgetError(
                f"'{source}' is a diffusers folder, so the merged model is one too: name a folder, "
                f"not '{target.name}'."
            )
        check_new(target)
        DiffusersModel.load(source).add_patches(_patches(options)).save(target)
    else:
        check_file(target, ".safetensors")
        merge_into_checkpoint(source, _patches(options), target)
    return {"checkpoint": str(target)}, f"saved: {target}"
