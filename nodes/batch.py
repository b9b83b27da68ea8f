"""One patch a concept, for a whole list."""

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.jobs.batch import forget_each
from ..fmn.methods import DEFAULT, settings_of
from .common import keep_input, model_input
from .patch import KIND, below_output
from .types import CATEGORY, Concepts, Method, Patches, show_text, told

FOLDER = "batch"
PARTS = 100  # of a concept, on the progress bar


class TrainForgetPatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_TrainForgetPatches",
            display_name="Train Forget Patches (Batch)",
            category=CATEGORY,
            description="Makes one forget patch for each concept of a list, as files in a folder. "
            "Patches that are there already are not made again, so a stopped run goes on where it "
            "was. For one patch of all concepts use Train Forget Patch.",
            inputs=[
                model_input(),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concepts.Input("concepts", tooltip="What to forget, each in a patch of its own."),
                io.String.Input(
                    "folder",
                    default=FOLDER,
                    tooltip=f"Folder of the files below output/{KIND}, with / for folders inside "
                    f"it. Empty: {FOLDER}.",
                ),
                Method.Input(
                    "method", optional=True, tooltip=f"How. Empty: {DEFAULT} with its defaults."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for concepts with reference pictures."
                ),
                keep_input(),
            ],
            outputs=[
                Patches.Output(
                    "PATCHES",
                    display_name="patches",
                    tooltip="All patches of the list, new and old, for Merge Forget Patches.",
                ),
                io.String.Output(
                    "REPORT",
                    display_name="report",
                    tooltip="What was made, what was there already, and what failed, as text.",
                ),
                io.Int.Output(
                    "FINISHED",
                    display_name="finished",
                    tooltip="How many concepts have a patch now.",
                ),
                io.Int.Output(
                    "FAILED",
                    display_name="failed",
                    tooltip="How many concepts have none, because something went wrong.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder=FOLDER, **inputs):  # a link gives none
        return _made.times_lost(below_output(folder.strip() or FOLDER))

    @classmethod
    def execute(cls, model, clip, concepts, folder, method=None, vae=None, keep=()):
        settings = method or settings_of(DEFAULT, {})
        path = below_output(folder.strip() or FOLDER)
        batch = forget_each(
            host_of(model, clip, vae), concepts, settings, path, _Progress(), tuple(keep)
        )
        _made.add(path, batch.files)
        report = batch.report()
        if not batch.files:
            raise ForgetError(report)
        text = f"output/{KIND}/{folder.strip() or FOLDER}: {report}"
        counts = len(batch.files), len(batch.failed)
        patches = [(file, 1.0) for file in batch.files]
        return io.NodeOutput(patches, report, *counts, ui=told(text, report))


class _Made:
    """The files that this session's runs gave: where one is gone, the node has to run again.

    A stamp of the folder would not do: the node writes into it, so that it and all behind it would
    run once more after each run that made something.
    """

    def __init__(self):
        self.files, self.times = {}, {}

    def add(self, folder, files):
        self.files.setdefault(folder, set()).update(files)

    def times_lost(self, folder):
        """How often files of a folder were found gone. It does not fall when they are made again,
        or the run after that would differ once more."""
        known = self.files.get(folder, set())
        gone = {file for file in known if not file.exists()}
        known -= gone
        self.times[folder] = self.times.get(folder, 0) + bool(gone)
        return self.times[folder]


_made = _Made()


class _Progress:
    """Draws where the batch is: the bar of the whole, and a line of text."""

    def __init__(self):
        self.bar = None

    def __call__(self, progress):
        comfy.model_management.throw_exception_if_processing_interrupted()
        total = progress.count * PARTS
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        self.bar.update_absolute(round(progress.done * PARTS), total)
        text = f"{progress.name}: {progress.index}/{progress.count}"
        if progress.seconds_left is not None:
            text += f", {progress.seconds_left:.0f} s left"
        show_text(text)


NODES = [TrainForgetPatches]
