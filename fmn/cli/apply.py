"""``python -m fmn apply``: options, and what they set going."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ForgetError
from ..settings import MAX_SEED, Settings, setting
from .options import add_settings, given_options

PICTURE = Path("picture.png")
DEMO_GUIDANCE = 3.5


@dataclass(frozen=True)
class Drawing(Settings):
    steps: int = setting(20, "Sampling steps.", limits=(1, 1000))
    guidance: float = setting(
        7.0,
        f"Guidance scale. 1: none. The demo model is drawn with {DEMO_GUIDANCE} unless told.",
        limits=(0.0, 100.0),
    )
    size: int = setting(0, "Pixels a side. 0: what the model was made for.", limits=(0, 4096, 64))
    seed: int = setting(0, "Same seed, same picture.", limits=(0, MAX_SEED))


def add_apply(commands):
    """Add ``apply``."""
    apply = commands.add_parser(
        "apply",
        help="draw with patches, or merge them into a checkpoint",
        description="Draw with patches on a model, or write the model with the patches in its "
        "weights. A file that is there is never written over.",
    )
    apply.add_argument("model", help="demo, a .safetensors checkpoint, or a diffusers folder")
    apply.add_argument("patch", nargs="+", help="FILE or FILE:STRENGTH; strength is 1 unless given")
    result = apply.add_mutually_exclusive_group(required=True)
    result.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="draw this; several --prompt make one picture with a row for each",
    )  # fmt: skip
    result.add_argument(
        "--checkpoint",
        type=Path,
        metavar="NEW",
        help="write the merged model here: a .safetensors file, or a folder if MODEL is one",
    )
    drawing = apply.add_argument_group("with --prompt")
    drawing.add_argument(
        "--out", type=Path, metavar="PNG", help=f"the picture ({PICTURE}, or a free number behind)"
    )
    add_settings(drawing, Drawing())


def run_apply(options):
    """Returns the result and its text."""
    given = given_options(options)
    if options.checkpoint:
        unused = next(iter(given), "out" if options.out else None)
        if unused:
            raise ForgetError(
                f"--{unused} is for drawing, and --checkpoint draws nothing: leave one out."
            )
        return _merge(options)
    return _draw(options, Drawing(**given), "guidance" in given)


def _patches(options):
    from ..files import file_and_strength
    from ..patches.patch import load_patch

    named = [file_and_strength(text) for text in options.patch]
    return [(load_patch(file), strength) for file, strength in named]


def _draw(options, drawing, guided):
    from ..files import check_file, free_name, write_whole
    from ..hosts.diffusers.model import DiffusersModel
    from ..images import labelled_grid, to_image
    from ..models.families import DEMO

    out = options.out or free_name(PICTURE)
    check_file(out, ".png")
    patches = _patches(options)
    model = DiffusersModel.load(options.model).add_patches(patches)
    model.pipeline.set_progress_bar_config(disable=False, desc="drawing")
    if model.family is DEMO and not guided:
        drawing = replace(drawing, guidance=DEMO_GUIDANCE)
    size = drawing.size or model.family.resolution
    noise = model.initial_noise([drawing.seed] * len(options.prompt), size)
    latents = model.sample_latents(options.prompt, noise, drawing.steps, drawing.guidance)
    images = [to_image(picture) for picture in model.decode(latents)]
    picture = images[0]
    if len(images) > 1:
        rows = [(prompt, [image]) for prompt, image in zip(options.prompt, images)]
        picture = labelled_grid(rows, [""], size)
    write_whole(out, lambda file: picture.save(file, format="PNG"))
    return {"picture": str(out)}, f"saved: {out}"


def _merge(options):
    from ..files import check_file, check_new
    from ..hosts.diffusers.load import DEMO_FILE
    from ..hosts.diffusers.model import DiffusersModel
    from ..patches.checkpoint import merge_into_checkpoint

    source = DEMO_FILE if options.model == "demo" else Path(options.model)
    target = options.checkpoint
    if source.is_dir():
        if target.suffix in (".safetensors", ".ckpt"):
            raise ForgetError(
                f"'{source}' is a diffusers folder, and so is what is made of it: name a folder, "
                f"not '{target.name}'."
            )
        check_new(target)
        DiffusersModel.load(source).add_patches(_patches(options)).save(target)
    else:
        check_file(target, ".safetensors")
        merge_into_checkpoint(source, _patches(options), target)
    return {"checkpoint": str(target)}, f"saved: {target}"
