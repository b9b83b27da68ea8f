"""Save, load, apply and inspect patches."""

import glob
import logging
import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.files import STATE_ENDING, check_portable, write_whole
from ..fmn.hosts.comfyui.host import ComfyHost
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.images import thumbnail_of_uri, thumbnail_uri
from ..fmn.methods.describe import describe
from ..fmn.patches.metadata import CHANGED, PRECISION, base_info, other_base
from ..fmn.patches.padding import lost_elsewhere
from ..fmn.patches.patch import ForgetPatch, load_patch, save_patch
from ..fmn.text import printable
from .common import file_stamp, listed_file, schema, strength_input
from .page import text_output
from .types import Patch

KIND = "forget_patches"
STATES = "forget_trainings"  # kind of the files beside patches that trainings resume from
DATE = re.compile("%date:([^%]*)%")
# Made for the demo model. Only the Load node lists them: "*" in a merge means the user's files.
DEMO_PATCHES = {
    f"demo/{path.name}": path
    for path in sorted((Path(__file__).parents[1] / "demo" / "patches").glob("*.safetensors"))
}


def _register_folders() -> None:
    """Patches live in models/ and output/; core's Load LoRA lists both too."""
    for folder in (os.path.join(folder_paths.models_dir, KIND), output_folder()):
        folder_paths.add_model_folder_path(KIND, folder)
        folder_paths.add_model_folder_path("loras", folder)
    paths, endings = folder_paths.folder_names_and_paths[KIND]
    endings.add(".safetensors")
    folder_paths.folder_names_and_paths[STATES] = (paths, {STATE_ENDING})


def output_folder() -> str:
    return os.path.join(folder_paths.get_output_directory(), KIND)


def below_output(name: str, kind: str = KIND) -> Path:
    """The path of a name in a folder of output/, with ComfyUI's variables such as %year% in it.

    Raises:
        ForgetError: the name leads out of that folder, or some system cannot have it.
    """
    root = Path(folder_paths.get_output_directory(), kind).resolve()
    path = (root / with_date(name.strip())).resolve()
    if root not in path.parents:
        raise ForgetError(
            f"The name '{name}' leads out of output/{kind}: use a plain name, with / for "
            "folders inside it."
        )
    for part in path.relative_to(root).parts:
        check_portable(part)
    return path


def with_date(name: str) -> str:
    """A name with what ComfyUI's savers replace: %year% and others by the server's function,
    %date:yyyy-MM-dd%, which only the page knows for its own nodes, here."""
    name = DATE.sub(lambda match: _formatted(match[1], datetime.now()), name)
    if "%" not in name:
        return name
    # The function makes the folder of a name, and refuses one outside; a flat name has none.
    folder, flat = folder_paths.get_output_directory(), name.replace("/", "\n")
    return folder_paths.get_save_image_path(flat, folder)[4].replace("\n", "/")


def _formatted(pattern: str, now: datetime) -> str:
    """A date in the page's format letters: yyyy or yy, and M, d, h, m, s, doubled for a zero."""
    parts = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def part(match: re.Match[str]) -> str:
        letters = match[0]
        if letters[0] == "y":
            return str(now.year)[-len(letters) :]
        return str(parts[letters[0]]).zfill(len(letters))

    return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", part, pattern)


def output_path(prefix: str) -> Path:
    """The next free ``PREFIX_00001.safetensors`` in output/forget_patches."""
    stem = below_output(prefix.strip() or "patch")
    pattern = f"{glob.escape(stem.name)}_*.safetensors"
    taken = stem.parent.glob(pattern) if stem.parent.is_dir() else ()
    numbers = [path.stem.removeprefix(f"{stem.name}_") for path in taken]
    number = max((int(n) for n in numbers if n.isdecimal()), default=0) + 1
    return stem.parent / f"{stem.name}_{number:05}.safetensors"


class SaveForgetPatch(io.ComfyNode):
    """Writes the patch to output/forget_patches. The file is a LoRA with the usual names: Load LoRA
    lists it too, and diffusers reads it.

    Inputs:
        patch: The patch to save.
        filename_prefix: Name of the file, with / for folders. A number is added.
        thumbnail: Up to four pictures for the patch shelf, such as one before and one after. They
            are stored small in the file, so whoever gets it sees them.

    Outputs:
        patch: The same patch, which now knows its file.
        file name: Name of the file in output/forget_patches.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            Patch.Input("patch"),
            io.String.Input("filename_prefix", default="patch"),
            io.Image.Input("thumbnail", optional=True),
        ]
        outputs = [Patch.Output("PATCH", "patch"), io.String.Output("NAME", "file name")]
        return schema(
            cls, "FMN_SaveForgetPatch", "Save Forget Patch", inputs, outputs, is_output_node=True
        )

    @classmethod
    def execute(
        cls, patch: ForgetPatch, filename_prefix: str, thumbnail: torch.Tensor | None = None
    ) -> io.NodeOutput:
        picture = None if thumbnail is None else thumbnail_uri(thumbnail)
        path = save_patch(patch, output_path(filename_prefix), picture)
        name = path.relative_to(Path(output_folder()).resolve()).as_posix()
        if picture:  # other programs look for one beside the file
            jpeg = thumbnail_of_uri(picture)
            write_whole(path.with_suffix(".jpg"), lambda file: file.write_bytes(jpeg))
        text = f"saved {name}, {path.stat().st_size / 1e6:.2f} MB, in output/{KIND}"
        text = "\n".join([text, *lost_elsewhere(patch.family, patch.changes)])
        saved = replace(patch, source=load_patch(path).source)
        return io.NodeOutput(saved, name, ui=text_output(text, name))


class LoadForgetPatch(io.ComfyNode):
    """Reads a patch from models/forget_patches or output/forget_patches and checks it.

    Inputs:
        file: Refresh (R) to see new files. Those in demo come with the pack, for the demo model.

    Outputs:
        patch: The patch, for Apply Forget Patch and others.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Combo.Input("file", options=[*folder_paths.get_filename_list(KIND), *DEMO_PATCHES])
        ]
        outputs = [Patch.Output("PATCH", "patch")]
        return schema(cls, "FMN_LoadForgetPatch", "Load Forget Patch", inputs, outputs)

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        # In place of ComfyUI's own check, which wants the exact text of the list: on Windows that
        # has backslashes, where the shelf and workflows from elsewhere have slashes. A link to
        # the input counts as None.
        return file is None or _path_of(str(file)) is not None or _missing(file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return file_stamp(_path_of(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = _path_of(file)
        if path is None:
            raise ForgetError(_missing(file))
        return io.NodeOutput(load_patch(path))


def _missing(name: str) -> str:
    return (
        f"There is no patch '{name}' in models/{KIND} or output/{KIND}: "
        "put the file there and choose it from the list."
    )


def _path_of(name: str) -> Path | None:
    """The file of a name on the list, or None. A user's file goes before one of the pack."""
    return listed_file(KIND, name) or DEMO_PATCHES.get(name.replace(os.sep, "/"))


class ApplyForgetPatch(io.ComfyNode):
    """Applies a patch to the model. It is merged into the weights when the model is loaded, so
    sampling is as fast as before. Chain several for several patches.

    Inputs:
        model: The model that should forget, of the family that the patch is for.
        patch: The patch to apply.
        strength: 0: the untouched model. 1: as trained. Above 1: forgets more and harms more. Below
            0: draws towards the concept.
        clip: Needed for patches that change the text encoder too; prompts must then be encoded with
            the CLIP that comes out.

    Outputs:
        MODEL: The patched model. The input does not change.
        CLIP: The CLIP to encode prompts with, changed by patches for the text encoder. Empty if
            none is connected.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            Patch.Input("patch"),
            strength_input(),
            io.Clip.Input("clip", optional=True),
        ]
        outputs = [io.Model.Output(), io.Clip.Output()]
        return schema(cls, "FMN_ApplyForgetPatch", "Apply Forget Patch", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, patch: ForgetPatch, strength: float, clip: CLIP | None = None
    ) -> io.NodeOutput:
        host = host_of(model, clip)
        if patch.changes_text and clip is None:
            raise ForgetError(
                "This patch changes the text encoder, but the clip input is empty: connect the "
                "CLIP, and encode prompts with the one that comes out."
            )
        patched = host.patched(patch, strength) if patch.changes_unet else model.clone()
        if patch.changes_text:
            clip = host.patched_clip(patch, strength)
        note = f"forgets {names_of(patch)} at strength {strength:g}{other_base_note(host, patch)}"
        if patch.info.get("changed"):
            note += f"; {CHANGED}"
        return io.NodeOutput(patched, clip, ui=text_output(note))


def names_of(patch: ForgetPatch) -> str:
    return printable(", ".join(patch.concepts))


def other_base_note(host: ComfyHost, patch: ForgetPatch) -> str:
    """What to add for a patch that was trained on another base; "" for the same base."""
    other = other_base(patch.info, base_info(host.fingerprint()))
    if not other:
        return ""
    logging.warning("Forget-Me-Not: the patch for %s was made on %s", names_of(patch), other)
    return f"; trained on {other}{'' if other == PRECISION else ', so check the result'}"


class InspectForgetPatch(io.ComfyNode):
    """Describes what a patch forgets, how it was made, and on which base.

    Inputs:
        patch: The patch to describe.

    Outputs:
        text: The description, a few lines of text.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [Patch.Input("patch")]
        outputs = [io.String.Output("TEXT", "text")]
        return schema(
            cls,
            "FMN_InspectForgetPatch",
            "Inspect Forget Patch",
            inputs,
            outputs,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, patch: ForgetPatch) -> io.NodeOutput:
        text = describe(patch)
        return io.NodeOutput(text, ui=text_output(text))


_register_folders()
NODES = [SaveForgetPatch, LoadForgetPatch, ApplyForgetPatch, InspectForgetPatch]
