"""The node with what few trainings need: previews, saving, resuming."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.resume import ENDING
from ..fmn.training import SMOOTHED
from .parts import stamp_of
from .patch import KIND, STATES, output_path
from .types import CATEGORY, Options

ANEW = "start anew"
KEPT_PROMPT = "a photo of a house"
MOST_STEPS = 100_000


@dataclass(frozen=True)
class TrainingOptions:
    """What the Training Options node says; the fields are its widgets."""

    preview_every: int = 0
    forgotten_prompt: str = ""
    kept_prompt: str = KEPT_PROMPT
    preview_steps: int = 8
    preview_seed: int = 0
    save_every: int = 0
    filename_prefix: str = "training"
    keep_best: bool = False
    resume: Path | None = None


def _states():
    """Training states that were saved, by name."""
    return [name.replace(os.sep, "/") for name in folder_paths.get_filename_list(STATES)]


class TrainingOptionsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_TrainingOptions",
            display_name="Training Options",
            category=CATEGORY,
            description="Previews while training, saving every some steps, resuming a training, "
            "and keeping the best step. Connect it to Train Forget Patch.",
            inputs=[
                io.Int.Input(
                    "preview_every",
                    default=10,
                    min=0,
                    max=MOST_STEPS,
                    tooltip="Steps between two previews: the same prompts and seed before training "
                    "and now, on the training node. 0: none. Needs the VAE on Train Forget Patch; "
                    "without it none are drawn. Methods that do not train show one pair at the "
                    "end.",
                ),
                io.String.Input(
                    "forgotten_prompt",
                    default="",
                    tooltip="Preview prompt that should change. Empty: the first concept's own.",
                ),
                io.String.Input(
                    "kept_prompt",
                    default=KEPT_PROMPT,
                    tooltip="Preview prompt that should stay as it is. Empty: none is drawn.",
                ),
                io.Int.Input(
                    "preview_steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Sampling steps of a preview. Few are fast and rough.",
                ),
                io.Int.Input(
                    "preview_seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Seed of the previews' noise, the same at every step.",
                ),
                io.Int.Input(
                    "save_every",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    tooltip=f"Steps between two saved patches, in output/{KIND}; the last step is "
                    "saved too. Beside the newest lies what it takes to resume. 0: nothing is "
                    "saved. Methods that do not train have nothing to save on the way.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="training",
                    tooltip="Name of those files, with / for folders; the step and a number are "
                    "added.",
                ),
                io.Boolean.Input(
                    "keep_best",
                    default=False,
                    tooltip=f"On: the patch is that of the step at which the mean of the last "
                    f"{SMOOTHED} losses was lowest. Off: of the last step. With fewer than "
                    f"{SMOOTHED} steps both are the same.",
                ),
                io.Combo.Input(
                    "resume",
                    options=[ANEW, *_states()],
                    default=ANEW,
                    tooltip=f"A training to go on with: a file ending in {ENDING} that save_every "
                    "left. Everything but the number of steps has to be as it was. New files show "
                    "up after a refresh (R).",
                ),
            ],
            outputs=[
                Options.Output(
                    "OPTIONS",
                    display_name="options",
                    tooltip="These options, for options on Train Forget Patch.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, resume=ANEW, **widgets):
        return stamp_of(folder_paths.get_full_path(STATES, resume) if resume in _states() else None)

    @classmethod
    def execute(cls, resume=ANEW, **widgets):
        path = None
        if resume != ANEW:
            path = _path_of(resume)
        if widgets.get("save_every"):
            output_path(widgets["filename_prefix"])  # a bad name is refused before training
        return io.NodeOutput(TrainingOptions(**widgets, resume=path))


def _path_of(name):
    # ComfyUI's lookup strips what leads out of the folders.
    path = folder_paths.get_full_path(STATES, name)
    if path is None or name.replace(os.sep, "/") not in _states():
        raise ForgetError(
            f"There is no training state '{name[:80]}' in output/{KIND}: choose one from the list, "
            f"or '{ANEW}'."
        )
    return Path(path)


NODES = [TrainingOptionsNode]
