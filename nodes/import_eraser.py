"""Import Eraser: other tools' files as forget patches."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..fmn.concepts.concept import Concept
from ..fmn.errors import ForgetError
from ..fmn.hosts.comfyui.host import base_weights
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.models.families import FAMILIES
from ..fmn.models.transformers import BY_KEY
from ..fmn.patches.file_check import MAX_RANK
from ..fmn.patches.import_patch import guess_concept, import_patch, open_eraser
from ..fmn.text import printable
from .common import file_stamp, schema
from .page import text_output
from .patch import KIND as PATCHES
from .progress import Progress
from .types import Concepts, Patch

KIND = "forget_imports"
NO_FILE, ANY_FAMILY = "none", "from the file"


def _register_folder() -> None:
    """Edited weights, which Load LoRA must not list, lie in models/forget_imports."""
    paths, _ = folder_paths.folder_names_and_paths.get(KIND, ([], set()))
    folder = os.path.join(folder_paths.models_dir, KIND)
    paths = paths if folder in paths else [*paths, folder]
    folder_paths.folder_names_and_paths[KIND] = (paths, folder_paths.supported_pt_extensions)


def _files() -> dict[str, Path]:
    """Name on the list -> path: files, LoRAs that are no forget patches, diffusers folders."""
    patches = set(folder_paths.get_filename_list(PATCHES))
    found = {}
    for kind in (KIND, "loras"):
        for name in folder_paths.get_filename_list(kind):
            path = folder_paths.get_full_path(kind, name)
            if path and (kind == KIND or name not in patches):
                found[f"{kind}/{name.replace(os.sep, '/')}"] = Path(path)
    for folder in (
        *folder_paths.get_folder_paths("diffusers"),
        *folder_paths.get_folder_paths(KIND),
    ):
        for index in sorted(Path(folder).glob("*/model_index.json")):
            found[f"diffusers/{index.parent.name}"] = index.parent
    return found


class ImportEraser(io.ComfyNode):
    """Makes a forget patch of another tool's file: LoRAs of any trainer, edited weights of ESD,
    UCE, SPEED and others, whole models.

    Inputs:
        file: A file in models/forget_imports or models/loras, or a folder in models/diffusers.
            Refresh (R) to see new files.
        concepts: What it forgets. Empty: the error suggests a name.
        model: The model that the eraser was made from, for files of edited weights, or a
            transformer that a LoRA is for. LoRAs on it do not count.
        clip: The CLIP of that model, if the eraser edits the text encoder.
        rank: Rank of each layer's change of edited weights. 0: where the spectrum has a gap.
            Higher: closer to the file, and larger.
        family: The kind of model, if the file fits several.

    Outputs:
        patch: The patch, for Apply, Save or Inspect Forget Patch and ConceptBench.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        families = [ANY_FAMILY, *FAMILIES, *BY_KEY]
        inputs: list[io.Input] = [
            io.Combo.Input("file", options=list(_files()) or [NO_FILE]),
            Concepts.Input("concepts", optional=True),
            io.Model.Input("model", optional=True),
            io.Clip.Input("clip", optional=True),
            io.Int.Input("rank", default=0, min=0, max=MAX_RANK, optional=True),
            io.Combo.Input("family", options=families, default=ANY_FAMILY, optional=True),
        ]
        outputs = [Patch.Output("PATCH", "patch")]
        return schema(cls, "FMN_ImportEraser", "Import Eraser", inputs, outputs)

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return file is None or str(file).replace(os.sep, "/") in _files() or _missing(file)

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, **inputs: Any) -> str:
        return file_stamp(_files().get(file.replace(os.sep, "/")))

    @classmethod
    def execute(
        cls, file: str, concepts: Sequence[Concept] | None = None,
        model: ModelPatcher | None = None, clip: CLIP | None = None, rank: int = 0,
        family: str = ANY_FAMILY,
    ) -> io.NodeOutput:  # fmt: skip
        path = _files().get(file.replace(os.sep, "/"))
        if path is None:
            raise ForgetError(_missing(file))
        if not concepts:
            raise ForgetError(
                f"What '{path.name:.80}' forgets is not known: connect Concept to Forget, perhaps "
                f'of "{guess_concept(open_eraser(path))}".'
            )
        entry = getattr(host_of(model).family, "entry", None) if model else None
        if entry and family == ANY_FAMILY:
            family = entry.key
        # LoRAs, all that is read for transformers, have no base.
        base = base_weights(model, clip) if (model or clip) and not entry else None
        progress = Progress()
        imported = import_patch(
            path,
            concepts,
            base,
            None if family == ANY_FAMILY else family,
            rank,
            lambda done, total: progress.show(done, f"layer {done} of {total}", total),
        )
        names = ", ".join(imported.patch.concepts)
        lines = [f"forgets {printable(names)}; read as {imported.kind}", *imported.notes]
        return io.NodeOutput(imported.patch, ui=text_output("\n".join(lines)))


def _missing(name: object) -> str:
    return (
        f"There is no file '{str(name):.80}' to import: put it into models/{KIND} or models/loras, "
        "and choose it from the list."
    )


_register_folder()
NODES = [ImportEraser]
