"""``python -m fmn batch`` and ``merge``."""

from argparse import Namespace
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ForgetError
from ..settings import HOW, PRESERVE
from .options import (
    MODEL,
    Commands,
    add_command,
    add_executor,
    add_keep,
    add_kind,
    add_method,
    add_model_options,
    add_out,
    given_settings,
    load_model,
)

if TYPE_CHECKING:
    from ..models.interface import UNetModel

MERGED = Path("merged.safetensors")


def add_batch(commands: Commands, asked: str | None) -> None:
    """Add ``batch``; ``asked`` is the method whose settings it takes."""
    batch = add_command(
        commands, "batch", run_batch, "make one patch for each concept of a list",
        usage="%(prog)s LIST --model MODEL [--method NAME] [--out FOLDER] [option ...]",
        description="Make a patch file for each concept of a list. Patches that exist in the "
        "folder are not made again: run the same command to continue after a stop. Every setting "
        "of the chosen method is an option.",
    )  # fmt: skip
    batch.add_argument("list", type=Path, help="file of concepts: lines, CSV, YAML or JSON")
    batch.add_argument("--model", required=True, help=MODEL)
    add_kind(batch)
    add_out(batch, "out/batch")
    add_model_options(batch)
    add_executor(batch, 1)
    add_method(batch, asked)


def add_merge(commands: Commands) -> None:
    """Add ``merge``."""
    merge = add_command(
        commands, "merge", run_merge, "merge several patches into one",
        description="Merge several patches into one, each with a strength. Existing files are "
        "never overwritten.",
    )  # fmt: skip
    merge.add_argument(
        "patch", nargs="+",
        help="FILE, FILE:STRENGTH or 'PATTERN*:STRENGTH'; strength is 1 unless given, and adds up "
        "if a file is named more than once",
    )  # fmt: skip
    merge.add_argument(
        "--out", type=Path, metavar="FILE", help=f"({MERGED}; a number is appended if it exists)"
    )
    merge.add_argument(
        "--how", choices=HOW, default=HOW[0],
        help="concatenate: add up. joint: solve for one change that does on each patch's prompts "
        "what that patch does; needs --model (%(default)s)",
    )  # fmt: skip
    merge.add_argument(
        "--budget-kb", type=int, default=0, metavar="N",
        help="largest size of the file in kB (1000 bytes); 0: any",
    )  # fmt: skip
    joint = merge.add_argument_group("for --how joint")
    joint.add_argument("--model", help=f"that the patches are for: {MODEL}")
    joint.add_argument(
        "--preserve", type=float, metavar="X",
        help=f"weight of kept prompts, 0 to 1000; 0: keep none ({PRESERVE:g})",
    )  # fmt: skip
    add_model_options(joint)
    add_keep(joint, default=None)


def run_batch(options: Namespace) -> tuple[dict[str, Any], str, bool]:
    """Returns the result, its text, and whether a concept failed."""
    from ..concepts.concept_list import read_concepts
    from ..files import check_folder
    from ..jobs.batch import Source, forget_each
    from ..jobs.executors import Here, open_executor
    from .progress import BatchBar

    settings = given_settings(options)
    concepts = read_concepts(options.list, options.kind)
    check_folder(options.out)
    with closing(open_executor(options.workers, options.ray)) as executor, BatchBar() as bar:
        model = load_model(options)
        source = Source(
            options.model, model.fingerprint(), str(options.vae or ""), options.prediction or ""
        )
        workers = None if isinstance(executor, Here) else (executor, source)
        batch = forget_each(
            model, concepts, settings, options.out, bar, tuple(options.keep), workers
        )
    result = {
        "patches": [str(path) for path in batch.files],
        "there": [str(path) for path in batch.existing],
        "failed": [{"name": each.name, "reason": reason} for each, reason in batch.failed],
    }
    return result, f"{batch.report()}\nfolder: {options.out}", bool(batch.failed)


def run_merge(options: Namespace) -> tuple[dict[str, Any], str]:
    """Returns the result and its text."""
    from ..files import check_file, chosen_files, free_name, matching_files
    from ..patches.merge import merge_patches
    from ..patches.patch import save_patch

    preserve = _check_merge(options)
    out = options.out or free_name(MERGED)
    check_file(out, ".safetensors")
    find = partial(matching_files, ending=".safetensors")
    sources = list(chosen_files(options.patch, find).items())
    budget = options.budget_kb * 1000
    if options.how == "joint":
        from ..jobs.joint_merge import joint_merge
        from .progress import StepBar

        model = load_model(options)
        with StepBar() as bar:
            merged = joint_merge(
                cast("UNetModel", model), sources, preserve, budget, bar, options.keep or ()
            )
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


def _check_merge(options: Namespace) -> float:
    """Refuse options of ``merge`` that do not fit; returns the weight of kept prompts."""
    if options.budget_kb < 0:
        raise ForgetError(f"--budget-kb is {options.budget_kb}: use 0 for any size, or more.")
    names = "model", "preserve", "keep", "vae", "prediction"
    for_joint = {name: getattr(options, name) for name in names}
    if options.how != "joint":
        unused = next((name for name, value in for_joint.items() if value is not None), None)
        if unused:
            raise ForgetError(
                f"--{unused} is for --how joint, not for {options.how}: leave it out, or add "
                "--how joint."
            )
    elif not options.model:
        raise ForgetError(
            "--how joint needs the --model that the patches are for, such as demo or a "
            ".safetensors checkpoint: give one."
        )
    preserve = PRESERVE if options.preserve is None else options.preserve
    if not 0 <= preserve <= 1000:
        raise ForgetError(f"--preserve is {preserve}: use 0 to 1000.")
    return preserve
