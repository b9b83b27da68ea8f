"""Several patches as one."""

import fnmatch
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.files import chosen_files
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.jobs.joint_merge import fuse
from ..fmn.patches.merge import merge_patches
from ..fmn.settings import HOW, PRESERVE
from .common import lines_of, stamp_of, strength_input
from .patch import KIND
from .types import CATEGORY, Keep, Patch, Patches, show_text, told


def _matching(pattern):
    """Paths of the patch files that a pattern matches, by their names inside the patch folders."""
    names = {name.replace(os.sep, "/"): name for name in folder_paths.get_filename_list(KIND)}
    # A name may look like a pattern: "dog [v2]".
    chosen = [pattern] if pattern in names else fnmatch.filter(names, pattern)
    return [Path(folder_paths.get_full_path_or_raise(KIND, names[name])) for name in chosen]


class PatchList(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_PatchList",
            display_name="Patches to Merge",
            category=CATEGORY,
            description="Puts a patch on a list, with a strength. Chain several, and give the list "
            "to Merge Forget Patches.",
            inputs=[
                Patch.Input("patch", tooltip="The patch to put on the list."),
                strength_input(
                    "Share of the patch in the merged one. 0: left out. 1: as trained. "
                    "Above: forgets more and harms more. Below 0: the change turned round."
                ),
                Patches.Input(
                    "patches",
                    optional=True,
                    tooltip="Patches that are on the list already. They come first.",
                ),
            ],
            outputs=[
                Patches.Output(
                    "PATCHES",
                    display_name="patches",
                    tooltip="The list with this patch at its end.",
                )
            ],
        )

    @classmethod
    def execute(cls, patch, strength, patches=None):
        return io.NodeOutput([*(patches or []), (patch, strength)])


class MergeForgetPatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_MergeForgetPatches",
            display_name="Merge Forget Patches",
            category=CATEGORY,
            description="Makes one patch of several, as small a file as you like. Save it with "
            "Save Forget Patch, put it on a model with Apply Forget Patch.",
            inputs=[
                io.Combo.Input(
                    "how",
                    options=list(HOW),
                    default=HOW[0],
                    tooltip="concatenate: the changes are added up, exactly. joint: one change is "
                    "solved for that does on each patch's prompts what that patch does, and leaves "
                    "other prompts; needs the model and its CLIP.",
                ),
                io.Int.Input(
                    "budget_kb",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Largest size of the file in kB. The weakest directions of all layers "
                    "are left out until it fits. 0: nothing is left out.",
                ),
                strength_input(
                    "Multiplies the strength of each patch of the list that is connected. "
                    "0: none of them. 1: as they come. Files below have their own."
                ),
                io.String.Input(
                    "files",
                    default="",
                    multiline=True,
                    tooltip=f"More patches, by names below output/{KIND} and models/{KIND}, one a "
                    "line. * stands for any letters, and :0.8 behind a name sets a strength: "
                    "batch/*:0.8. Empty: only those that are connected.",
                ),
                Patches.Input(
                    "patches",
                    optional=True,
                    tooltip="From Train Forget Patches (Batch) or Patches to Merge.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="Only for joint: the model they are made for."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for joint: the CLIP of the same checkpoint.",
                ),
                Keep.Input(
                    "keep",
                    optional=True,
                    tooltip="Only for joint: words and prompts that shall not change, beside the "
                    "lists that come along.",
                ),
                io.Float.Input(
                    "preserve",
                    default=PRESERVE,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    tooltip="Only for joint: weight of prompts that shall not change. 0: none are "
                    "looked at. Higher: less harm, and less is forgotten.",
                ),
            ],
            outputs=[
                Patch.Output(
                    "PATCH",
                    display_name="patch",
                    tooltip="One patch that does what all of them do.",
                ),
                io.String.Output(
                    "REPORT",
                    display_name="report",
                    tooltip="What was merged, and what was lost by the size, as text.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, files="", **inputs):
        chosen = chosen_files(lines_of(files), _matching)
        return str([(str(path), stamp_of(path)) for path in chosen])

    @classmethod
    def execute(
        cls, how, budget_kb, strength, files, patches=None, model=None, clip=None, keep=(),
        preserve=PRESERVE,
    ):  # fmt: skip
        sources = [(patch, strength * own) for patch, own in patches or []]
        sources += chosen_files(lines_of(files), _matching).items()
        if how == "joint":
            if model is None or clip is None:
                raise ForgetError(
                    "Joint merging looks at what the model reads, but the model or the clip input "
                    "is empty: connect both, or merge by concatenate."
                )
            host = host_of(model, clip)
            merged = fuse(host, sources, preserve, budget_kb * 1000, _Progress(), keep)
        elif how == "concatenate":
            merged = merge_patches(sources, budget_kb * 1000)
        else:
            raise ForgetError(f"how is '{how}': choose one of {', '.join(HOW)}.")
        report = merged.report()
        return io.NodeOutput(merged.patch, report, ui=told(report))


class _Progress:
    """Draws a step of joint merging on the node."""

    def __init__(self):
        self.bar = None

    def __call__(self, step):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(step.total)
        self.bar.update_absolute(step.index, step.total)
        show_text(f"step {step.index}/{step.total}, {step.seconds_left:.0f} s left")


NODES = [PatchList, MergeForgetPatches]
