"""``python -m fmn import``: another tool's eraser as a forget patch."""

import argparse
from pathlib import Path

from ..models.families import FAMILIES


def add_import(commands: argparse._SubParsersAction) -> None:
    """Add ``import``."""
    about = "turn another tool's eraser into a forget patch"
    parser = commands.add_parser(
        "import",
        help=about,
        description=f"{about.capitalize()}: LoRAs of any trainer (kohya, PEFT, LECO, SPM, sliders), "
        "edited U-Net or text encoder weights (ESD, UCE, SPEED, RECE, concept ablation), whole "
        "checkpoints, and diffusers folders. Pickles are read without running code in them.",
    )
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
    parser.add_argument(
        "--family", choices=list(FAMILIES), help="model family, if the file fits several"
    )
    parser.add_argument(
        "--rank", type=int, default=0, metavar="N",
        help="rank of each layer of edited weights; 0 cuts at the gap of the spectrum (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="(forget_CONCEPT.safetensors)")


def run_import(options: argparse.Namespace) -> tuple[dict, str]:
    """Import, save, and say what was read and what was lost."""
    from ..concepts.concept_list import concept_of
    from ..files import check_file, free_name
    from ..methods.describe import describe
    from ..patches.import_patch import import_patch
    from ..patches.patch import save_patch

    concepts = [concept_of(text, options.kind) for text in options.concept]
    if options.out:
        check_file(options.out, ".safetensors")
    imported = import_patch(options.file, concepts, options.base, options.family, options.rank)
    name = "_".join(concepts[0].name.split())
    path = save_patch(imported.patch, options.out or free_name(Path(f"forget_{name}.safetensors")))
    lines = [describe(imported.patch), f"read as: {imported.kind}", *imported.notes]
    result = {"out": str(path), "kind": imported.kind, "notes": list(imported.notes)}
    return result, "\n".join([*lines, f"saved: {path}"])
