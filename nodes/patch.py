"""Save, load, apply and inspect patches."""

import glob
import logging
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.files import STATE_ENDING, write_whole
from ..fmn.hosts.comfyui.host import ComfyHost
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.images import thumbnail_of_uri, thumbnail_uri
from ..fmn.methods.describe import describe
from ..fmn.patches.metadata import CHANGED
from ..fmn.patches.padding import lost_elsewhere
from ..fmn.patches.patch import ForgetPatch, load_patch, save_patch
from ..fmn.text import printable
from .common import file_stamp, model_input, strength_input
from .page import text_output
from .types import CATEGORY, Patch

KIND = "forget_patches"
STATES = "forget_trainings"  # kind of the files beside patches that trainings resume from
# Made for the demo model. Only the Load node lists them: "*" in a merge means the user's files.
DEMO_PATCHES = {
    f"demo/{path.name}": path
    for path in sorted((Path(__file__).parents[1] / "demo" / "patches").glob("*.safetensors"))
}


def _register_folders() -> None:
    """Patches live in models/ and output/; core's Load LoRA lists both too."""
    folders = [os.path.join(folder_paths.models_dir, KIND), output_folder()]
    known, extensions = folder_paths.folder_names_and_paths.get(KIND, ([], set()))
    paths = [*known, *(folder for folder in folders if folder not in known)]
    folder_paths.folder_names_and_paths[KIND] = (paths, extensions | {".safetensors"})
    folder_paths.folder_names_and_paths[STATES] = (paths, {STATE_ENDING})
    for folder in folders:
        folder_paths.add_model_folder_path("loras", folder)


def output_folder() -> str:
    return os.path.join(folder_paths.get_output_directory(), KIND)


def below_output(name: str, kind: str = KIND) -> Path:
    """The path of a name in a folder of output/.

    Raises:
        ForgetError: the name leads out of that folder.
    """
    root = Path(folder_paths.get_output_directory(), kind).resolve()
    path = (root / name.strip()).resolve()
    if root not in path.parents:
        raise ForgetError(
            f"The name '{name}' leads out of output/{kind}: use a plain name, with / for "
            "folders inside it."
        )
    return path


def output_path(prefix: str) -> Path:
    """The next free ``PREFIX_00001.safetensors`` in output/forget_patches.

    Raises:
        ForgetError: the name leads out of that folder.
    """
    stem = below_output(prefix.strip() or "patch")
    pattern = f"{glob.escape(stem.name)}_*.safetensors"
    taken = stem.parent.glob(pattern) if stem.parent.is_dir() else ()
    numbers = [path.stem.removeprefix(f"{stem.name}_") for path in taken]
    number = max((int(n) for n in numbers if n.isdecimal()), default=0) + 1
    return stem.parent / f"{stem.name}_{number:05}.safetensors"


class SaveForgetPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_SaveForgetPatch",
            display_name="Save Forget Patch",
            category=CATEGORY,
            description=f"Writes the patch to output/{KIND}. The file is a LoRA with the usual "
            "names: Load LoRA lists it too, and diffusers reads it.",
            inputs=[
                Patch.Input("patch", tooltip="The patch to save."),
                io.String.Input(
                    "filename_prefix",
                    default="patch",
                    tooltip="Name of the file, with / for folders. A number is added.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="Up to four pictures for the patch shelf, such as one before and one "
                    "after. They are stored small in the file, so whoever gets it sees them.",
                ),
            ],
            outputs=[
                Patch.Output(
                    "PATCH",
                    display_name="patch",
                    tooltip="The same patch, which now knows its file.",
                ),
                io.String.Output(
                    "NAME", display_name="file name", tooltip=f"Name of the file in output/{KIND}."
                ),
            ],
            is_output_node=True,
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
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_LoadForgetPatch",
            display_name="Load Forget Patch",
            category=CATEGORY,
            description=f"Reads a patch from models/{KIND} or output/{KIND} and checks it.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*folder_paths.get_filename_list(KIND), *DEMO_PATCHES],
                    tooltip="Refresh (R) to see new files. Those in demo come with the pack, for "
                    "the demo model.",
                )
            ],
            outputs=[
                Patch.Output(
                    "PATCH",
                    display_name="patch",
                    tooltip="The patch, for Apply Forget Patch and others.",
                )
            ],
        )

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


def _path_of(name: str) -> str | Path | None:
    """The file of a name on the list, or None. A user's file goes before one of the pack."""
    name = name.replace(os.sep, "/")
    # ComfyUI's lookup strips what leads out of the folders, so only listed names are looked up.
    listed = {each.replace(os.sep, "/"): each for each in folder_paths.get_filename_list(KIND)}
    path = folder_paths.get_full_path(KIND, listed[name]) if name in listed else None
    return path or DEMO_PATCHES.get(name)


class ApplyForgetPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_ApplyForgetPatch",
            display_name="Apply Forget Patch",
            category=CATEGORY,
            description="Applies a patch to the model. It is merged into the weights when the "
            "model is loaded, so sampling is as fast as before. Chain several for several patches.",
            inputs=[
                model_input("The model that should forget, of the family that the patch is for."),
                Patch.Input("patch", tooltip="The patch to apply."),
                strength_input(
                    "0: the untouched model. 1: as trained. Above 1: forgets more and harms more. "
                    "Below 0: draws towards the concept."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Needed for patches that change the text encoder too; prompts must "
                    "then be encoded with the CLIP that comes out.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The patched model. The input does not change."),
                io.Clip.Output(
                    tooltip="The CLIP to encode prompts with, changed by patches for the text "
                    "encoder. Empty if none is connected."
                ),
            ],
        )

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
    if patch.info.get("base.fingerprint") == host.fingerprint():
        return ""
    logging.warning("Forget-Me-Not: the patch for %s is for another base", names_of(patch))
    return "; trained on another base of this family, so check the result"


class InspectForgetPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_InspectForgetPatch",
            display_name="Inspect Forget Patch",
            category=CATEGORY,
            description="Describes what a patch forgets, how it was made, and on which base.",
            inputs=[Patch.Input("patch", tooltip="The patch to describe.")],
            outputs=[
                io.String.Output(
                    "TEXT", display_name="text", tooltip="The description, a few lines of text."
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, patch: ForgetPatch) -> io.NodeOutput:
        text = describe(patch)
        return io.NodeOutput(text, ui=text_output(text))


_register_folders()
NODES = [SaveForgetPatch, LoadForgetPatch, ApplyForgetPatch, InspectForgetPatch]
