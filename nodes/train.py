"""Method nodes and the training node."""

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..fmn.concept import Concept
from ..fmn.errors import NonFiniteLoss
from ..fmn.hosts.comfy import ComfyModel
from ..fmn.methods import resteer
from ..fmn.patch import rescue
from ..fmn.pictures import progress_picture
from ..fmn.spans import END_TOKENS
from .patch import output_path
from .types import CATEGORY, Concepts, Method, Patch, show_text

PREVIEW_SIDE = 512


class MethodResteer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        default = resteer.Settings()
        return io.Schema(
            node_id="FMN_MethodResteer",
            display_name="Method: Re-steer",
            category=CATEGORY,
            description="Attention re-steering (Forget-Me-Not, arXiv 2303.17591): trains away the "
            "attention that the concept's words get.",
            inputs=[
                io.Int.Input(
                    "steps",
                    default=default.steps,
                    min=1,
                    max=10000,
                    tooltip="Training steps for each concept. More forget more, and harm what is "
                    "close to the concept. 1: hardly a change.",
                ),
                io.Float.Input(
                    "lr",
                    display_name="learning rate",
                    default=default.lr,
                    min=1e-7,
                    max=0.1,
                    step=1e-7,
                    round=False,
                    tooltip="AdamW's learning rate. Around 0.002 for low rank; the released code "
                    "trains full weights with 0.000002.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=1,
                    max=128,
                    tooltip="Rank of the patch: how many directions each layer may change. The "
                    "file grows with it (0.4 MB at rank 4 for Stable Diffusion 1.5).",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(resteer.SCOPES),
                    default=default.layers,
                    tooltip="What is trained. kv: keys and values of cross-attention. attention: "
                    "all of cross-attention. unet: every linear and convolution layer.",
                ),
                io.Boolean.Input(
                    "full_weights",
                    default=default.full_weights,
                    tooltip="On: train whole weight matrices, as released, and cut them to the "
                    "rank when done; needs far more memory. Off: train the low rank itself.",
                ),
                io.Combo.Input(
                    "end_tokens",
                    options=list(END_TOKENS),
                    default=default.end_tokens,
                    tooltip="Also take attention from the end-of-text token, which sums up the "
                    "prompt: none, the first one, or all (in Stable Diffusion 1.x that includes "
                    "all padding, as in the released code).",
                ),
                io.Combo.Input(
                    "references",
                    options=list(resteer.REFERENCES),
                    default=default.references,
                    tooltip="What is noised for concepts without pictures. zeros: nothing, which "
                    "is fastest. samples: pictures that the model draws of the concept first.",
                ),
                io.Int.Input(
                    "samples",
                    default=default.samples,
                    min=1,
                    max=64,
                    tooltip="How many pictures a concept, if references is 'samples'.",
                ),
                io.Int.Input(
                    "batch",
                    default=default.batch,
                    min=1,
                    max=64,
                    tooltip="Prompts a step. 1 as released; more are steadier, slower and need "
                    "more memory.",
                ),
                io.Int.Input(
                    "size",
                    default=default.size,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Pixels a side while training. 0: what the model was made for. "
                    "Smaller is faster and needs less memory.",
                ),
                io.Boolean.Input(
                    "checkpointing",
                    default=default.checkpointing,
                    tooltip="On: save memory by computing some things twice, which takes longer.",
                ),
                io.Int.Input(
                    "training_seed",
                    default=default.seed,
                    min=0,
                    max=2**53,
                    tooltip="The same seed and settings give the same patch.",
                ),
            ],
            outputs=[Method.Output("METHOD", display_name="method")],
        )

    @classmethod
    def execute(cls, training_seed, **settings):
        return io.NodeOutput(resteer.Settings(seed=training_seed, **settings))


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
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                Concepts.Input("concepts", tooltip="What to forget."),
                Method.Input(
                    "method", optional=True, tooltip="How. Empty: re-steer with its defaults."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed for concepts with reference pictures."
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
    def execute(cls, model, clip, concepts, method=None, vae=None):
        settings = method or resteer.Settings()
        losses = []
        show = _Progress(concepts)

        def on_step(step):
            losses[:] = step.losses
            show(step)

        try:
            patch = resteer.run(ComfyModel(model, clip, vae), concepts, settings, on_step)
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
        before, now = step.before, step.now
        picture = progress_picture(step.losses, step.total, before, now)
        self.bar.update_absolute(step.index, step.total, ("JPEG", picture, PREVIEW_SIDE))
        show_text(
            f"{self.name}: step {step.index}/{step.total}, loss {step.losses[-1]:.4g}, "
            f"attention {before.share:.2%} -> {now.share:.2%}, "
            f"{step.seconds_left:.0f} s left"
        )


NODES = [MethodResteer, TrainForgetPatch]
