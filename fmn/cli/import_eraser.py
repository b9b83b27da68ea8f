"""``python -m fmn import``: another tool's eraser as a forget patch."""

import argparse
from pathlib import Path
from typing import Any

from ..models.families import FAMILIES
from ..models.transformers import BY_KEY
from .options import Commands, add_command

DESCRIPTION = """\
Reads LoRAs of any trainer (kohya, PEFT, LECO, SPM, sliders, traintrain), of transformers too,
edited U-Net or text encoder weights (ESD, UCE, OCE, SPEED, RECE, concept ablation, AdvUnlearn),
whole checkpoints, and folders (MACE, EraseFlow, Forget-Me-Not). Pickles are read without running
code in them. A folder of the patches made here is a method of 'bench'.
"""


def add_import(commands: Commands) -> None:
    """Add ``import``."""
    about = "turn another tool's eraser into a forget patch"
    parser = add_command(commands, "import", run_import, about)
    parser.description = DESCRIPTION
    parser.add_argument("file", type=Path, help="the eraser: a file or a diffusers folder")
    parser.add_argument(
        "--concept", action="append", default=[], metavar="CONCEPT",
        help="what it forgets, written as for forget; several times if it forgets several",
    )  # fmt: skip
    parser.add_argument("--kind", default="object", help="of concepts that name none (%(default)s)")
    parser.add_argument(
        "--base", type=Path, metavar="MODEL",
        help="the model it was made from, a checkpoint or a diffusers folder; needed for edited "
        "weights, not for LoRAs",
    )  # fmt: skip
    parser.add_argument("--family", choices=[*FAMILIES, *BY_KEY], help="if the file fits several")
    parser.add_argument(
        "--rank", type=int, default=0, metavar="N",
        help="rank of each layer of edited weights; 0 cuts at the gap of the spectrum "
        "(%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="(forget_CONCEPT.safetensors)")


def run_import(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Import and save; returns what was read and what was lost, and its text."""
    from ..concepts.concept_list import concept_of
    from ..errors import ForgetError
    from ..files import check_file, free_name
    from ..hosts.diffusers.load import DEMO_FILE
    from ..methods.describe import describe
    from ..patches.file_check import MAX_RANK
    from ..patches.import_patch import import_patch
    from ..patches.padding import lost_elsewhere
    from ..patches.patch import save_patch

    if not 0 <= options.rank <= MAX_RANK:
        raise ForgetError(f"--rank is {options.rank}: use 0 to {MAX_RANK}.")
    concepts = [concept_of(text, options.kind) for text in options.concept]
    if options.out:
        check_file(options.out, ".safetensors")
    base = DEMO_FILE if str(options.base) == "demo" else options.base
    imported = import_patch(options.file, concepts, base, options.family, options.rank)
    name = "_".join(concepts[0].name.split())
    path = options.out or free_name(Path(f"forget_{name}.safetensors"))
    save_patch(imported.patch, path)
    notes = [*imported.notes, *lost_elsewhere(imported.patch.family, imported.patch.changes)]
    lines = [describe(imported.patch), f"read as: {imported.kind}", *notes]
    result = {"patch": str(path), "kind": imported.kind, "notes": notes}
    return result | {"info": imported.patch.info}, "\n".join([*lines, f"saved: {path}"])
