"""``python -m fmn batch`` and ``merge``: options, and what they set going."""

import glob
from pathlib import Path

from ..concepts.concept import KINDS
from ..errors import ForgetError
from ..settings import HOW, PRESERVE
from .options import add_method, given_settings

MERGED = Path("merged.safetensors")


def add_batch(commands, asked):
    """Add ``batch``; ``asked`` is the method whose settings it takes."""
    batch = commands.add_parser(
        "batch",
        help="make one patch for each concept of a list",
        usage="%(prog)s LIST --model MODEL [--method NAME] [--out FOLDER] [option ...]",
        description="Make a patch file for each concept of a list. What is in the folder already "
        "is not made again: run the same command to go on after a stop. Every setting of the "
        "chosen method is an option.",
    )
    batch.add_argument("list", type=Path, help="file of concepts: lines, CSV, YAML or JSON")
    batch.add_argument(
        "--model", required=True, help="demo, a .safetensors checkpoint, or a diffusers folder"
    )
    batch.add_argument(
        "--kind", choices=KINDS, default="object", help="of concepts without one (%(default)s)"
    )
    batch.add_argument(
        "--out", type=Path, default=Path("out/batch"), metavar="FOLDER", help="(%(default)s)"
    )
    add_method(batch, asked)


def add_merge(commands):
    """Add ``merge``."""
    merge = commands.add_parser(
        "merge",
        help="make one patch of several",
        description="Make one patch of several, each with a strength. A file that is there is "
        "never written over.",
    )
    merge.add_argument(
        "patch",
        nargs="+",
        help="FILE, FILE:STRENGTH or 'PATTERN*:STRENGTH'; strength is 1 unless given, and adds up "
        "where a file is named more than once",
    )
    merge.add_argument(
        "--out", type=Path, metavar="FILE", help=f"({MERGED}, or a free number behind)"
    )
    merge.add_argument(
        "--how",
        choices=HOW,
        default=HOW[0],
        help="concatenate: add up. joint: solve for one change that does on each patch's prompts "
        "what that patch does; takes --model (%(default)s)",
    )
    merge.add_argument(
        "--budget-kb", type=int, default=0, metavar="N",
        help="largest size of the file in kB (1000 bytes); 0: any",
    )  # fmt: skip
    joint = merge.add_argument_group("for --how joint")
    joint.add_argument(
        "--model", help="that the patches are for: demo, a .safetensors checkpoint, or a folder"
    )
    joint.add_argument(
        "--preserve",
        type=float,
        metavar="X",
        help=f"weight of kept prompts, 0 to 1000; 0: none are looked at ({PRESERVE:g})",
    )
    joint.add_argument(
        "--keep",
        action="append",
        metavar="WORDS",
        help="words or a prompt that shall not change; several times if you like",
    )


def run_batch(options):
    """Returns the result, its text, and whether a concept failed."""
    from ..concepts.concept_list import read_concepts
    from ..files import check_folder
    from ..hosts.diffusers.model import DiffusersModel
    from ..jobs.batch import forget_each
    from .progress import BatchBar

    settings = given_settings(options)
    concepts = read_concepts(options.list, options.kind)
    check_folder(options.out)
    model = DiffusersModel.load(options.model)
    with BatchBar() as bar:
        batch = forget_each(model, concepts, settings, options.out, bar, tuple(options.keep))
    result = {
        "patches": [str(path) for path in batch.files],
        "there": [str(path) for path in batch.there],
        "failed": [{"name": each.name, "reason": reason} for each, reason in batch.failed],
    }
    return result, f"{batch.report()}\nfolder: {options.out}", bool(batch.failed)


def run_merge(options):
    """Returns the result and its text."""
    from ..files import check_file, chosen_files, free_name
    from ..patches.merge import merge_patches
    from ..patches.patch import save_patch

    preserve = _check_merge(options)
    out = options.out or free_name(MERGED)
    check_file(out, ".safetensors")
    sources, budget = chosen_files(options.patch, _matching).items(), options.budget_kb * 1000
    if options.how == "joint":
        from ..hosts.diffusers.model import DiffusersModel
        from ..jobs.joint_merge import fuse
        from .progress import Bar

        model = DiffusersModel.load(options.model)
        with Bar() as bar:
            merged = fuse(model, sources, preserve, budget, bar, tuple(options.keep or ()))
    else:
        merged = merge_patches(sources, budget)
    save_patch(merged.patch, out)
    result = {
        "patch": str(out),
        "bytes": out.stat().st_size,
        "error": merged.error,
        "notes": merged.notes,
        "info": merged.patch.info,
    }
    return result, f"{merged.report()}\nsaved: {out}"


def _check_merge(options):
    """Refuse options of ``merge`` that do not fit; returns the weight of kept prompts."""
    if options.budget_kb < 0:
        raise ForgetError(f"--budget-kb is {options.budget_kb}: use 0 for any size, or more.")
    if options.how == "joint":
        if not options.model:
            raise ForgetError(
                "--how joint looks at what a model reads: give the --model that the patches are "
                "for, such as demo or a .safetensors checkpoint."
            )
        preserve = PRESERVE if options.preserve is None else options.preserve
        if not 0 <= preserve <= 1000:
            raise ForgetError(f"--preserve is {preserve}: use 0 to 1000.")
        return preserve
    unused = [name for name in ("model", "preserve", "keep") if getattr(options, name) is not None]
    if unused:
        raise ForgetError(
            f"--{unused[0]} is for --how joint, and this is {options.how}: leave it out, or merge "
            "by --how joint."
        )
    return PRESERVE


def _matching(pattern):
    """Files that a pattern matches; a plain name is one, whether it is there or not."""
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    return [Path(name) for name in sorted(glob.glob(pattern)) if name.endswith(".safetensors")]
