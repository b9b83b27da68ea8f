"""The training node."""

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..fmn.errors import NonFiniteLoss
from ..fmn.hosts.comfy_other import host_of
from ..fmn.methods import DEFAULT, DEFAULT_MANY, MANY, default_settings, forget
from ..fmn.patch import rescue
from ..fmn.pictures import maps_picture
from ..fmn.preview import Previews
from ..fmn.resume import Saves, load_state
from ..fmn.supervisor import Supervisor
from .live import Live
from .parts import keep_input, model_input
from .patch import output_path
from .training import TrainingOptions
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
        settings, options = method or default_settings(concepts), options or TrainingOptions()
        host, losses = host_of(model, clip, vae), []
        resume = load_state(options.resume) if options.resume else None
        title = ", ".join(concept.name for concept in concepts)
        with Live(title, workflow_id()) as live:
            saves = Saves(
                options.save_every,
                lambda step: output_path(f"{options.filename_prefix}_step{step}"),
            )
            show, previews = _Progress(live), _Previews(host, concepts, options, live)

            def on_step(step):
                losses[:] = step.losses
                show(step)
                saves(step)
                previews(step)

            try:
                supervisor = Supervisor(on_step, resume, options.keep_best)
                patch = forget(host, concepts, settings, supervisor, keep)
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
        if step.before:
            picture = maps_picture(step.before, step.now)
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

    def __call__(self, step):
        self.steps = step.index
        if self.every and step.training and step.index % self.every == 0 < step.total - step.index:
            self.live.previews(self.drawn.during(step.training), step.index)

    def finish(self, patch):
        if self.every:
            self.live.previews(self.drawn.after(patch), self.steps)


NODES = [TrainForgetPatch]
