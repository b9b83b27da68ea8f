"""The training node."""

import os
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..fmn.errors import ForgetError, NonFiniteLoss
from ..fmn.files import STATE_ENDING
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.images import maps_picture
from ..fmn.methods import DEFAULT, DEFAULT_MANY, MANY, default_settings, forget
from ..fmn.patches.patch import rescue
from ..fmn.training.preview import Previews
from ..fmn.training.resume import load_state
from ..fmn.training.run import SMOOTHED, SaveEvery, TrainingOptions
from .common import keep_input, model_input, stamp_of
from .live_training import Live
from .patch import KIND, STATES, output_path
from .types import CATEGORY, Concepts, Method, Options, Patch, workflow_id

PREVIEW_SIDE = 512


class TrainForgetPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_TrainForgetPatch",
            display_name="Train Forget Patch",
            category=CATEGORY,
            description="Trains a small patch that makes the model forget. The model itself comes "
            "back unchanged; put the patch on it with Apply Forget Patch.",
            inputs=[
                model_input(),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concepts.Input("concepts", tooltip="What to forget."),
                Method.Input(
                    "method",
                    optional=True,
                    tooltip=f"How. Empty: {DEFAULT} with its defaults; for more than {MANY} "
                    f"concepts {DEFAULT_MANY}, whose patch is for the CLIP.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Needed for concepts with reference pictures, and for previews.",
                ),
                keep_input(),
                Options.Input(
                    "options",
                    optional=True,
                    tooltip="Previews, saving on the way, resuming: from Training Options. Empty: "
                    "none of these.",
                ),
            ],
            outputs=[
                Patch.Output(
                    "PATCH",
                    display_name="patch",
                    tooltip="The patch, for Apply Forget Patch and Save Forget Patch.",
                ),
                io.Custom("LORA_MODEL").Output(
                    "LORA", display_name="lora", tooltip="The same patch for core's LoRA nodes."
                ),
                io.Custom("LOSS_MAP").Output(
                    "LOSS",
                    display_name="loss",
                    tooltip="The loss of each step, for core's Plot Loss Graph.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concepts, method=None, vae=None, keep=(), options=None):
        settings, options = method or default_settings(concepts), options or Widgets()
        host, losses = host_of(model, clip, vae), []
        resume = load_state(options.resume) if options.resume else None
        title = ", ".join(concept.name for concept in concepts)
        with Live(title, workflow_id()) as live:
            save = SaveEvery(
                options.save_every,
                lambda step: output_path(f"{options.filename_prefix}_step{step}"),
            )
            show, previews = _Progress(live), _Previews(host, concepts, options, live)

            def on_step(progress):
                losses[:] = progress.losses
                show(progress)

            def after_step(progress, run):
                save(progress, run)
                previews(progress, run)

            training = TrainingOptions(resume, options.keep_best, after_step)
            try:
                patch = forget(host, concepts, settings, on_step, keep, training)
            except NonFiniteLoss as error:
                raise rescue(error, output_path("rescued")) from error
            previews.finish(patch)
        return io.NodeOutput(patch, patch.lora(), {"loss": losses})


class _Progress:
    """Draws a step on the node: bar, picture and the live view."""

    def __init__(self, live):
        self.live, self.bar = live, None

    def __call__(self, step):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(step.total)
        preview = None
        if step.attention_before:
            picture = maps_picture(step.attention_before, step.attention_now)
            preview = ("JPEG", picture, PREVIEW_SIDE)
        self.bar.update_absolute(step.index, step.total, preview)
        self.live.step(step)


class _Previews:
    """Draws previews every some steps and when done, if they are asked for and can be drawn."""

    def __init__(self, host, concepts, options, live):
        self.every, self.live, self.steps, self.drawn = options.preview_every, live, 0, None
        if not self.every:
            return
        missing = None if host.family.known else f"{host.family.title} has no previews yet."
        if host.vae is None:
            missing = "No previews: the vae input is empty."
        if missing:
            live.note(missing)
            self.every = 0
            return
        own = concepts[0].training_prompts()[0].text if concepts else ""
        prompts = options.forgotten_prompt.strip() or own, options.kept_prompt.strip()
        self.drawn = Previews(
            host, filter(None, prompts), options.preview_steps, options.preview_seed
        )

    def __call__(self, progress, run):
        self.steps, last = progress.index, progress.index == progress.total
        if self.every and progress.index % self.every == 0 and not last:
            self.live.previews(self.drawn.during(run), progress.index)

    def finish(self, patch):
        if self.every:
            self.live.previews(self.drawn.after(patch), self.steps)


ANEW = "start anew"
KEPT_PROMPT = "a photo of a house"
MOST_STEPS = 100_000


@dataclass(frozen=True)
class Widgets:
    """The values of the Training Options node."""

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
                    tooltip=f"A training to go on with: a file ending in {STATE_ENDING} that "
                    "save_every "
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
        return io.NodeOutput(Widgets(**widgets, resume=path))


def _path_of(name):
    # ComfyUI's lookup strips what leads out of the folders.
    path = folder_paths.get_full_path(STATES, name)
    if path is None or name.replace(os.sep, "/") not in _states():
        raise ForgetError(
            f"There is no training state '{name[:80]}' in output/{KIND}: choose one from the list, "
            f"or '{ANEW}'."
        )
    return Path(path)


NODES = [TrainForgetPatch, TrainingOptionsNode]
