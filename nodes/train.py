"""The training node."""

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..fmn.concept import Concept
from ..fmn.errors import NonFiniteLoss
from ..fmn.hosts.comfy_other import host_of
from ..fmn.methods import DEFAULT, forget, settings_of
from ..fmn.patch import rescue
from ..fmn.pictures import progress_picture
from .patch import output_path
from .types import CATEGORY, Concepts, Keep, Method, Patch, show_text

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
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 1.x, 2.x or XL. The method ESD also takes other "
                    "models that draw pictures from text, such as Flux.",
                ),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concepts.Input("concepts", tooltip="What to forget."),
                Method.Input(
                    "method", optional=True, tooltip=f"How. Empty: {DEFAULT} with its defaults."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for concepts with reference pictures."
                ),
                Keep.Input(
                    "keep",
                    optional=True,
                    tooltip="Words and prompts that shall not change, for the methods that can "
                    "protect some. Empty: the method's own keep-list.",
                ),
            ],
            outputs=[
                Patch.Output("PATCH", display_name="patch"),
                io.Custom("LORA_MODEL").Output(
                    "LORA", display_name="lora", tooltip="The same patch for core's LoRA nodes."
                ),
                io.Custom("LOSS_MAP").Output("LOSS", display_name="loss"),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concepts, method=None, vae=None, keep=()):
        settings = method or settings_of(DEFAULT, {})
        losses = []
        show = _Progress(concepts)

        def on_step(step):
            losses[:] = step.losses
            show(step)

        try:
            patch = forget(host_of(model, clip, vae), concepts, settings, on_step, keep)
        except NonFiniteLoss as error:
            raise rescue(error, output_path("rescued")) from error
        return io.NodeOutput(patch, patch.lora(), {"loss": losses})


class _Progress:
    """Draws a step on the node: bar, picture and a line of text."""

    def __init__(self, concepts: list[Concept]):
        self.name = ", ".join(concept.name for concept in concepts)
        self.bar = None

    def __call__(self, step):
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(step.total)
        text = f"{self.name}: step {step.index}/{step.total}, loss {step.losses[-1]:.4g}"
        preview = None
        if step.before:
            picture = progress_picture(step.losses, step.total, step.before, step.now)
            preview = ("JPEG", picture, PREVIEW_SIDE)
            text += f", attention {step.before.share:.2%} -> {step.now.share:.2%}"
        self.bar.update_absolute(step.index, step.total, preview)
        note = f"\n{step.note}" if step.note else ""
        show_text(f"{text}, {step.seconds_left:.0f} s left{note}")


NODES = [TrainForgetPatch]
