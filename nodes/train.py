"""The training node, and its options: previews, saving on the way, resuming."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io

from ..fmn.concepts.concept import Concept
from ..fmn.errors import ForgetError, NonFiniteLoss, memory_ran_out
from ..fmn.hosts.comfyui.host import ComfyHost
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.images import maps_picture
from ..fmn.methods import DEFAULT, DEFAULT_MANY, MANY, default_settings, forget
from ..fmn.metrics.neighbours import Neighbours, neighbours
from ..fmn.metrics.outcome import in_words, outcomes
from ..fmn.models.interface import Model
from ..fmn.patches.patch import ForgetPatch, rescue
from ..fmn.progress import StepProgress
from ..fmn.settings import Settings
from ..fmn.training.preview import Previews
from ..fmn.training.resume import load_state
from ..fmn.training.run import SMOOTHED, SaveEvery, TrainingOptions, TrainingRun
from .common import (
    advanced,
    clip_input,
    file_names,
    file_stamp,
    keep_input,
    listed_file,
    schema,
    seed_input,
)
from .live_training import LiveTraining
from .patch import KIND, STATES, output_path
from .progress import Progress
from .types import Concepts, Method, Options, Patch

NO_STATE = "start anew"  # the choice of "resume" that resumes nothing
KEPT_PROMPT = "a photo of a house"
MAX_STEPS = 100_000


@dataclass(frozen=True)
class OptionWidgets:
    """The widgets of the Training Options node."""

    preview_every: int = 0
    forgotten_prompt: str = ""
    kept_prompt: str = KEPT_PROMPT
    preview_steps: int = 8
    preview_seed: int = 0
    save_every: int = 0
    filename_prefix: str = "training"
    keep_best: bool = False
    resume: Path | None = None


class TrainForgetPatch(io.ComfyNode):
    """Trains a small patch that makes the model forget. The model itself does not change: apply the
    patch to it with Apply Forget Patch.

    Inputs:
        model: Stable Diffusion 1.x, 2.x or XL. The method ESD also trains other text-to-image
            models, such as Flux.
        concepts: What to forget.
        vae: Needed for concepts with reference pictures, and for previews.
        options: Previews, saving during training, and resuming: from Training Options. Empty: none
            of these.

    Outputs:
        patch: The patch, for Apply Forget Patch and Save Forget Patch.
        lora: The same patch for core's LoRA nodes.
        loss: The loss of each step, for core's Plot Loss Graph.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Model.Input("model"),
            clip_input(),
            Concepts.Input("concepts"),
            Method.Input(
                "method",
                optional=True,
                tooltip=f"How to forget. Empty: {DEFAULT} with its defaults, or on U-Nets, for "
                f"more than {MANY} concepts, {DEFAULT_MANY}, whose patch changes the CLIP.",
            ),
            io.Vae.Input("vae", optional=True),
            keep_input(),
            Options.Input("options", optional=True),
        ]
        outputs = [
            Patch.Output("PATCH", "patch"),
            io.Custom("LORA_MODEL").Output("LORA", "lora"),
            io.Custom("LOSS_MAP").Output("LOSS", "loss"),
        ]
        return schema(cls, "FMN_TrainForgetPatch", "Train Forget Patch", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, concepts: list[Concept],
        method: Settings | None = None, vae: VAE | None = None, keep: Sequence[str] = (),
        options: OptionWidgets | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        host, bar = host_of(model, clip, vae), Progress()
        settings = method or default_settings(concepts, unet=host.family.known)
        options = options or OptionWidgets()
        losses: list[float] = []
        prefix = f"{options.filename_prefix}_step"
        save = SaveEvery(options.save_every, lambda step: output_path(f"{prefix}{step}"))
        resume = load_state(options.resume) if options.resume else None
        with LiveTraining(", ".join(concept.name for concept in concepts)) as live:
            previews = _Previews(host, concepts, options, live)

            def on_step(step: StepProgress) -> None:
                losses[:] = step.losses
                before, now = step.attention_before, step.attention_now
                maps = maps_picture(before, now) if before and now else None
                bar.show(step.index, total=step.total, picture=maps)
                live.step(step)
                previews.steps = step.index

            def after_step(step: StepProgress, run: TrainingRun) -> None:
                save(step, run)
                previews(step, run)

            training = TrainingOptions(resume, options.keep_best, after_step)
            near = neighbours(host, concepts, settings, keep)
            live.outcome("\n".join(map(str, near)))
            try:
                patch = forget(host, concepts, settings, on_step, keep, training)
            except NonFiniteLoss as error:
                raise rescue(error, output_path("rescued")) from error
            previews.finish(patch)
            live.outcome("Measuring what is left ...")
            answer = _answer(host, patch, concepts, near)
            live.outcome(answer)
        return io.NodeOutput(patch, patch.lora(), {"loss": losses}, ui={"text": (answer,)})


def _answer(
    host: Model, patch: ForgetPatch, concepts: list[Concept], near: Sequence[Neighbours]
) -> str:
    """What the patch did, in words. Where that cannot be measured, the patch is not lost."""
    try:
        return "\n".join(in_words(outcomes(host, patch, concepts, near), concepts))
    except (ForgetError, RuntimeError) as error:
        reason = error if isinstance(error, ForgetError) else memory_ran_out(error)
        if reason is None:
            raise
        return f"What is left was not measured: {reason}"


class _Previews:
    """Draws previews every some steps and at the end, if they are wanted and can be drawn."""

    def __init__(
        self, host: ComfyHost, concepts: Sequence[Concept], options: OptionWidgets,
        live: LiveTraining,
    ) -> None:  # fmt: skip
        self.every, self.live, self.steps = options.preview_every, live, 0
        if not self.every:
            return
        if host.vae is None or not isinstance(host, ComfyModel):
            missing = "the vae input is empty" if host.vae is None else "unsupported model"
            live.note(f"No previews: {missing}.")
            self.every = 0
            return
        first = concepts[0].training_prompts()[0].words if concepts else ""
        prompts = options.forgotten_prompt.strip() or first, options.kept_prompt.strip()
        steps, seed = options.preview_steps, options.preview_seed
        self.pictures = Previews(host, filter(None, prompts), steps, seed)

    def __call__(self, step: StepProgress, run: TrainingRun) -> None:
        is_last = step.index == step.total  # those are drawn with the finished patch
        if self.every and step.index % self.every == 0 and not is_last:
            self.live.previews(self.pictures.during(run), step.index)

    def finish(self, patch: ForgetPatch) -> None:
        if self.every:
            self.live.previews(self.pictures.after(patch), self.steps)


class TrainingOptionsNode(io.ComfyNode):
    """Previews and saved patches during training, resuming, and keeping the best step. Connect it
    to Train Forget Patch.

    Inputs:
        preview_every: Steps between two previews on the training node: the same prompts and seed
            before training and now. 0: no previews. Needs the VAE on Train Forget Patch. Methods
            that do not train show one pair at the end.
        forgotten_prompt: Preview prompt that should change. Empty: the first concept's own.
        kept_prompt: Preview prompt that should not change. Empty: none is drawn.
        preview_steps: Sampling steps of a preview. Few are fast and rough.
        preview_seed: Seed of the previews' noise, the same at every step.
        save_every: Steps between two saved patches, in output/forget_patches; the last step is
            saved too, and beside the newest patch what it takes to resume. 0: nothing is saved.
            Methods that do not train save nothing on the way.
        filename_prefix: Name of those files, with / for folders. The step and a number are added.
        resume: A training to resume: a file ending in .fmn-train that save_every left. All settings
            but the number of steps must be the same. Refresh (R) to see new files.

    Outputs:
        options: These options, for options on Train Forget Patch.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Int.Input("preview_every", default=10, min=0, max=MAX_STEPS),
            io.String.Input("forgotten_prompt", default=""),
            io.String.Input("kept_prompt", default=KEPT_PROMPT),
            *advanced(
                io.Int.Input("preview_steps", default=8, min=1, max=100),
                seed_input("preview_seed", 2**63 - 1),
            ),
            io.Int.Input("save_every", default=0, min=0, max=MAX_STEPS),
            io.String.Input("filename_prefix", default="training"),
            io.Boolean.Input(
                "keep_best",
                default=False,
                tooltip=f"On: the patch of the step at which the mean of the last {SMOOTHED} "
                "losses was lowest. Off: the patch of the last step. With fewer than "
                f"{SMOOTHED} steps both are the same.",
            ),
            io.Combo.Input("resume", options=[NO_STATE, *file_names(STATES)], default=NO_STATE),
        ]
        outputs = [Options.Output("OPTIONS", "options")]
        return schema(cls, "FMN_TrainingOptions", "Training Options", inputs, outputs)

    @classmethod
    def fingerprint_inputs(cls, resume: str = NO_STATE, **widgets: Any) -> str:
        return file_stamp(listed_file(STATES, resume))

    @classmethod
    def execute(cls, resume: str = NO_STATE, **widgets: Any) -> io.NodeOutput:
        if widgets.get("save_every"):
            output_path(widgets["filename_prefix"])  # refuses a bad name before training
        path = listed_file(STATES, resume)
        if path is None and resume != NO_STATE:
            raise ForgetError(
                f"There is no training state '{resume[:80]}' in output/{KIND}: choose one from the "
                f"list, or '{NO_STATE}'."
            )
        return io.NodeOutput(OptionWidgets(**widgets, resume=path))


NODES = [TrainForgetPatch, TrainingOptionsNode]
