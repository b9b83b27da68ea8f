"""``python -m fmn batch`` and ``merge``: options, and what they set going."""

import glob
from pathlib import Path

from .concept import KINDS
from .merged_names import HOW, PRESERVE
from .options import add_method, given_settings


def add_batch(commands, asked):
    """Add ``batch``; ``asked`` is the method whose settings it takes."""
    batch = commands.add_parser(
        "batch",
        help="train one patch for each concept of a list",
        description="Make a patch file for each concept of a list. What is in the folder already "
        "is not made again: run the same command to go on after a stop. Every setting of the "
        "chosen method is an option.",
    )
    batch.add_argument("list", type=Path, help="file of concepts: lines, CSV, YAML or JSON")
    batch.add_argument(
        "--model", default="demo", help="demo, a .safetensors checkpoint, or a diffusers folder"
    )
    batch.add_argument("--kind", choices=KINDS, default="object", help="kind of those without one")
    batch.add_argument("--out", type=Path, default=Path("out/batch"), help="folder (%(default)s)")
    add_method(batch, asked)


def add_merge(commands):
    """Add ``merge``."""
    merge = commands.add_parser(
        "merge",
        help="make one patch of several",
        description="Make one patch of several, each with a strength.",
    )
    merge.add_argument(
        "patch",
        nargs="+",
        help="FILE, FILE:STRENGTH or 'PATTERN*:STRENGTH'; strength is 1 unless given",
    )
    merge.add_argument("--out", type=Path, default=Path("merged.safetensors"), help="(%(default)s)")
    merge.add_argument(
        "--how",
        choices=HOW,
        default=HOW[0],
        help="concatenate: add up. joint: solve for one change that does on each patch's prompts "
        "what that patch does; takes --model (%(default)s)",
    )
    merge.add_argument(
        "--budget-kb", type=int, default=0, help="largest size of the file in kB; 0: any"
    )
    merge.add_argument("--model", default="demo", help="of --how joint (%(default)s)")
    merge.add_argument(
        "--preserve",
        type=float,
        default=PRESERVE,
        help="joint: weight of kept prompts (%(default)s)",
    )
    merge.add_argument(
        "--keep", action="append", default=[], help="joint: words or a prompt that shall not change"
    )


def run_batch(options):
    """Returns the result, its text, and whether a concept failed."""
    from .bar import BatchBar
    from .batch import forget_each
    from .concept_list import read_concepts
    from .hosts.diffusers import DiffusersModel

    settings = given_settings(options)
    concepts = read_concepts(options.list, options.kind)
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
    from .errors import ForgetError
    from .files import chosen_files
    from .merging import merge
    from .patch import save_patch

    if options.budget_kb < 0:
        raise ForgetError(f"--budget-kb is {options.budget_kb}: use 0 for any size, or more.")
    sources, budget = chosen_files(options.patch, _matching).items(), options.budget_kb * 1000
    if options.how == "joint":
        from .bar import Bar
        from .fuse import fuse
        from .hosts.diffusers import DiffusersModel

        model = DiffusersModel.load(options.model)
        with Bar() as bar:
            merged = fuse(model, sources, options.preserve, budget, bar, tuple(options.keep))
    else:
        merged = merge(sources, budget)
    save_patch(merged.patch, options.out)
    result = {
        "patch": str(options.out),
        "bytes": options.out.stat().st_size,
        "error": merged.error,
        "notes": merged.notes,
        "info": merged.patch.info,
    }
    return result, f"{merged.report()}\nsaved: {options.out}"


def _matching(pattern):
    """Files that a pattern matches; a plain name is one, whether it is there or not."""
    path = Path(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    return [Path(name) for name in sorted(glob.glob(pattern)) if name.endswith(".safetensors")]
