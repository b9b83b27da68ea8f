"""One patch per concept, for a whole list."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from server import PromptServer

from ..fmn.concepts.concept import Concept
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.jobs.batch import BatchProgress, forget_each
from ..fmn.methods import DEFAULT, settings_of
from ..fmn.settings import Settings
from .common import clip_input, keep_input, schema
from .page import running_server, text_output
from .patch import KIND, below_output
from .progress import Progress
from .types import Concepts, Method, Patches

FOLDER = "batch"
PARTS = 100  # of a concept, on the progress bar
MOST_FOLDERS = 64  # whose files are remembered


class TrainForgetPatches(io.ComfyNode):
    """Makes one forget patch for each concept of a list, as files in a folder. Existing patches are
    not made again, so a stopped run resumes where it was. For one patch of all concepts use Train
    Forget Patch.

    Inputs:
        model: Stable Diffusion 1.x, 2.x or XL. The method ESD also trains other text-to-image
            models, such as Flux.
        concepts: What to forget, with one patch each.
        folder: Folder of the files in output/forget_patches, with / for folders inside it. Empty:
            batch.
        vae: Needed for concepts with reference pictures.

    Outputs:
        patches: All patches of the list, new and existing, for Merge Forget Patches.
        report: What was made, what existed already, and what failed, as text.
        finished: How many concepts have a patch now.
        failed: How many concepts have no patch because something went wrong.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            Concepts.Input("concepts"),
            io.String.Input("folder", default=FOLDER),
            Method.Input(
                "method",
                optional=True,
                tooltip=f"How to forget. Empty: {DEFAULT} with its defaults.",
            ),
            io.Vae.Input("vae", optional=True),
            keep_input(),
        ]
        outputs = [
            Patches.Output("PATCHES", "patches"),
            io.String.Output("REPORT", "report"),
            io.Int.Output("FINISHED", "finished"),
            io.Int.Output("FAILED", "failed"),
        ]
        return schema(
            cls,
            "FMN_TrainForgetPatches",
            "Train Forget Patches (Batch)",
            inputs,
            outputs,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = FOLDER, **inputs: Any) -> int:  # a link gives none
        made = _files_made()
        return made.version(_path_of(folder)) if made else 0

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, concepts: Sequence[Concept], folder: str,
        method: Settings | None = None, vae: VAE | None = None, keep: Sequence[str] = (),
    ) -> io.NodeOutput:  # fmt: skip
        settings, path = method or settings_of(DEFAULT, {}), _path_of(folder)
        host, bar = host_of(model, clip, vae), Progress()

        def on_progress(progress: BatchProgress) -> None:
            text = f"{progress.name}: {progress.index}/{progress.count}"
            if progress.seconds_left is not None:
                text += f", {progress.seconds_left:.0f} s left"
            bar.show(round(progress.done * PARTS), text, progress.count * PARTS)

        batch = forget_each(host, concepts, settings, path, on_progress, tuple(keep))
        if made := _files_made():
            made.add(path, batch.files)
        report = batch.report()
        if not batch.files:
            raise ForgetError(report)
        text = f"output/{KIND}/{folder.strip() or FOLDER}: {report}"
        counts = len(batch.files), len(batch.failed)
        patches = [(file, 1.0) for file in batch.files]
        return io.NodeOutput(patches, report, *counts, ui=text_output(text, report))


def _path_of(folder: str) -> Path:
    return below_output(folder.strip() or FOLDER)


class FilesMade:
    """The files that runs made since the server started: if one is deleted, ComfyUI must run the
    node again.

    A stamp of the folder would not do: the node writes into it, so that the node and all nodes
    behind it would run once more after each run that made something. The version of a folder
    changes only when files are found missing, or when the folder was forgotten for newer ones.
    """

    def __init__(self, most: int = MOST_FOLDERS) -> None:
        self.most, self.newest, self.unknown = most, 0, 0
        # Folder -> (its files, its version), the one used last at the end.
        self._folders: OrderedDict[Path, tuple[set[Path], int]] = OrderedDict()

    def add(self, folder: Path, files: Iterable[Path]) -> None:
        known, version = self._folders.pop(folder, (set(), self.unknown))
        self._folders[folder] = known | set(files), version
        while len(self._folders) > self.most:
            self._folders.popitem(last=False)
            self.newest = self.unknown = self.newest + 1

    def version(self, folder: Path) -> int:
        known, version = self._folders.get(folder, (set(), self.unknown))
        present = {file for file in known if file.exists()}
        if present != known:
            # Kept when the files are made again, or the run after that would differ once more.
            self.newest = version = self.newest + 1
            self._folders[folder] = present, version
        return version


FILES_MADE = web.AppKey("forget-me-not.files-made", FilesMade)


def start(server: PromptServer) -> None:
    server.app[FILES_MADE] = FilesMade()


def _files_made() -> FilesMade | None:
    server = running_server()
    return server.app[FILES_MADE] if server else None


NODES = [TrainForgetPatches]
