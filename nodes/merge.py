"""Several patches as one."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.files import chosen_files, readings
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.jobs.joint_merge import joint_merge
from ..fmn.patches.merge import merge_patches
from ..fmn.patches.patch import ForgetPatch
from ..fmn.settings import HOW, PRESERVE
from .common import file_names, file_stamp, lines_of, schema, strength_input
from .page import text_output
from .patch import KIND
from .progress import Progress
from .types import Keep, Patch, Patches

PatchAndStrength = tuple[ForgetPatch | Path, float]  # a path is that of a patch file


class PatchList(io.ComfyNode):
    """Adds a patch with a strength to a list. Chain several, and connect the list to Merge Forget
    Patches.

    Inputs:
        patch: The patch to add to the list.
        strength: Strength of this patch in the merged one. 0: left out. 1: as trained. Above 1:
            forgets more and harms more. Below 0: the opposite change.
        patches: Patches that are already on the list. They come first.

    Outputs:
        patches: The list with this patch at its end.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [Patch.Input("patch"), strength_input(), Patches.Input("patches", optional=True)]
        outputs = [Patches.Output("PATCHES", "patches")]
        return schema(cls, "FMN_PatchList", "Patches to Merge", inputs, outputs)

    @classmethod
    def execute(
        cls, patch: ForgetPatch, strength: float, patches: Sequence[PatchAndStrength] | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput([*(patches or []), (patch, strength)])


class MergeForgetPatches(io.ComfyNode):
    """Merges several patches into one, with a file as small as you like. Save it with Save Forget
    Patch, or apply it to a model with Apply Forget Patch.

    Inputs:
        how: concatenate: adds up the changes, exactly. joint: solves for one change that does on
            each patch's prompts what that patch does, and leaves other prompts alone; needs the
            model and its CLIP.
        budget_kb: Largest size of the file in kB. The weakest directions of all layers are left out
            until it fits. 0: nothing is left out.
        strength: Multiplies the strength of each connected patch. 0: none of them. 1: as they are.
            Files below have their own.
        files: More patches, one per line, by their names in output/forget_patches and
            models/forget_patches. * stands for any letters, and :0.8 after a name sets a strength:
            batch/*:0.8. Empty: only connected patches.
        patches: From Train Forget Patches (Batch) or Patches to Merge.
        model: Only for joint: the model that the patches are for.
        clip: Only for joint: the CLIP of the same checkpoint.
        keep: Only for joint: words and prompts that must not change, in addition to the built-in
            lists.
        preserve: Only for joint: weight of prompts that must not change. 0: they are ignored.
            Higher: less harm, and less is forgotten.

    Outputs:
        patch: One patch that does what all of them do.
        report: What was merged, and what the size limit cost, as text.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Combo.Input("how", options=list(HOW), default=HOW[0]),
            io.Int.Input("budget_kb", default=0, min=0, max=10_000_000),
            strength_input(),
            io.String.Input("files", default="", multiline=True),
            Patches.Input("patches", optional=True),
            io.Model.Input("model", optional=True),
            io.Clip.Input("clip", optional=True),
            Keep.Input("keep", optional=True),
            io.Float.Input(
                "preserve", default=PRESERVE, min=0.0, max=1000.0, step=0.1, optional=True
            ),
        ]
        outputs = [Patch.Output("PATCH", "patch"), io.String.Output("REPORT", "report")]
        return schema(cls, "FMN_MergeForgetPatches", "Merge Forget Patches", inputs, outputs)

    @classmethod
    def fingerprint_inputs(cls, files: str = "", **inputs: Any) -> str:
        chosen = chosen_files(lines_of(files), _matching)
        return str([(str(path), file_stamp(path)) for path in chosen])

    @classmethod
    def execute(
        cls, how: str, budget_kb: int, strength: float, files: str,
        patches: Sequence[PatchAndStrength] | None = None, model: ModelPatcher | None = None,
        clip: CLIP | None = None, keep: Sequence[str] = (), preserve: float = PRESERVE,
    ) -> io.NodeOutput:  # fmt: skip
        sources = [(patch, strength * of_patch) for patch, of_patch in patches or []]
        sources += chosen_files(lines_of(files), _matching).items()
        if how == "joint":
            if model is None or clip is None:
                raise ForgetError(
                    "Joint merging needs the model and its CLIP, but the model or the clip input "
                    "is empty: connect both, or merge by concatenate."
                )
            host, on_step = cast(ComfyModel, host_of(model, clip)), Progress().step
            merged = joint_merge(host, sources, preserve, budget_kb * 1000, on_step, keep)
        elif how == "concatenate":
            merged = merge_patches(sources, budget_kb * 1000)
        else:
            raise ForgetError(f"how is '{how}': choose one of {', '.join(HOW)}.")
        report = merged.report()
        return io.NodeOutput(merged.patch, report, ui=text_output(report))


def _matching(pattern: str) -> list[Path]:
    """Paths of the patch files whose names inside the patch folders match a pattern."""
    names = file_names(KIND)
    # A name may look like a pattern: "dog [v2]".
    matches = (fnmatch.filter(names, reading) for reading in readings(pattern))
    chosen = [pattern] if pattern in names else next(filter(None, matches), [])
    return [Path(folder_paths.get_full_path_or_raise(KIND, names[name])) for name in chosen]


NODES = [PatchList, MergeForgetPatches]
