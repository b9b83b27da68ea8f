"""Forgetting while sampling: guidance away from a concept, and patches behind a gate."""

from comfy_api.latest import io

from ..fmn.errors import ForgetError
from ..fmn.guidance.prompt_gate import HIGH, LOW, patch_gate
from ..fmn.guidance.safe_latent_diffusion import PRESETS, SAFETY_TEXT, SafeSettings, concept_prompt
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.hosts.comfyui.sampling_wrappers import erased_by_negative, gated, safely_guided
from ..fmn.text import printable
from .common import strength_input
from .types import CATEGORY, Concepts, Patch, told

CUSTOM = "custom"
MODES = "replace", "join"


def _concepts_input():
    return Concepts.Input(
        "concepts",
        optional=True,
        tooltip="What to leave out. If connected, names and aliases stand in place of the text.",
    )


class SafeLatentDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        custom = PRESETS["medium"]
        return io.Schema(
            node_id="FMN_SafeLatentDiffusion",
            display_name="Safe Latent Diffusion",
            category=CATEGORY,
            description="Steers sampling away from a concept (arXiv 2211.05105). No training and "
            "no change of weights; each step costs about half as much again.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.String.Input(
                    "text",
                    default=SAFETY_TEXT,
                    multiline=True,
                    tooltip="What to leave out, if no concepts are connected. The default is the "
                    "paper's.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="medium",
                    tooltip="The paper's four strengths, made for 50 steps, or custom: the five "
                    "numbers below.",
                ),
                io.Int.Input(
                    "warmup",
                    default=custom.warmup,
                    min=0,
                    max=10000,
                    tooltip="Custom only. The first so many steps of a run are not steered and "
                    "settle the layout. 0: steer from the start. As many as the sampler has, or "
                    "more: never steer.",
                ),
                io.Float.Input(
                    "scale",
                    default=custom.scale,
                    min=0.0,
                    max=1e6,
                    step=10.0,
                    tooltip="Custom only. How fast steering grows with the difference between "
                    "prompt and concept. 0: off, at no cost. 5000, as in max: at full strength "
                    "nearly everywhere below the threshold.",
                ),
                io.Float.Input(
                    "threshold",
                    default=custom.threshold,
                    min=-100.0,
                    max=100.0,
                    step=0.005,
                    round=False,
                    tooltip="Custom only. Parts whose noise prediction for the prompt exceeds the "
                    "concept's by this are left alone. -100: steer nothing. 0: half of the "
                    "picture or so. 1 and more: nearly everything.",
                ),
                io.Float.Input(
                    "momentum_scale",
                    default=custom.momentum_scale,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Custom only. How much of the guidance of earlier steps is added. "
                    "0: none. 1: all of the momentum.",
                ),
                io.Float.Input(
                    "momentum_beta",
                    default=custom.momentum_beta,
                    min=0.0,
                    max=0.999,
                    step=0.05,
                    tooltip="Custom only. How long momentum lasts. 0: one step. Near 1: it builds "
                    "up slowly and stays.",
                ),
                _concepts_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, steered away from the concept whenever it samples."
                )
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, preset, concepts=None, **numbers):
        if preset not in (*PRESETS, CUSTOM):
            raise ForgetError(f"Unknown preset '{preset}': use {', '.join(PRESETS)} or {CUSTOM}.")
        settings = SafeSettings(**numbers) if preset == CUSTOM else PRESETS[preset]
        host = ComfyModel(model, clip)
        prompt = concept_prompt(concepts, text)
        if settings.scale == 0:
            return io.NodeOutput(model.clone(), ui=told("off, as scale is 0"))
        steered = safely_guided(host, host.encode(prompt), settings)
        return io.NodeOutput(steered, ui=told(f"steers away from {printable(prompt.text)}"))


class EraseByNegativePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_EraseByNegativePrompt",
            display_name="Erase by Negative Prompt",
            category=CATEGORY,
            description="Puts a concept into the negative prompt of whatever samples with this "
            "model. The simplest way to leave something out, at no cost.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="What to leave out, if no concepts are connected.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="replace: the concept stands in place of your negative prompt, as in "
                    "the literature. join: it stands behind your own, and both share the "
                    "attention.",
                ),
                _concepts_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, which samples with the concept in its negative prompt."
                )
            ],
        )

    @classmethod
    def execute(cls, model, clip, text, mode, concepts=None):
        if mode not in MODES:
            raise ForgetError(f"Unknown mode '{mode}': use {' or '.join(MODES)}.")
        host = ComfyModel(model, clip)
        prompt = concept_prompt(concepts, text)
        steered = erased_by_negative(host, host.encode(prompt), mode == "join")
        return io.NodeOutput(steered, ui=told(f"negative prompt: {printable(prompt.text)}"))


class ApplyGatedPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FMN_ApplyGatedPatch",
            display_name="Apply Gated Patch",
            category=CATEGORY,
            description="Puts a patch on the model that acts only on prompts close to its "
            "concepts, so other prompts stay as they are. Chain several for several patches.",
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL."),
                io.Clip.Input(
                    "clip", tooltip="The CLIP that your prompts are encoded with, as it goes there."
                ),
                Patch.Input("patch", tooltip="The patch to put behind the gate."),
                strength_input(
                    "With the gate open. 0: the untouched model. 1: as trained. Above: "
                    "forgets more. Below 0: draws towards the concept."
                ),
                io.Float.Input(
                    "low",
                    default=LOW,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Closeness of prompt and concept at which the gate starts to open. "
                    "-1: always a bit open. Near 1: only for the concept's own words.",
                ),
                io.Float.Input(
                    "high",
                    default=HIGH,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Closeness at which the gate is fully open; above low. 1: hardly ever "
                    "fully open. Near -1: always open.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with the patch behind its gate. The input stays as it was."
                )
            ],
        )

    @classmethod
    def execute(cls, model, clip, patch, strength, low, high):
        host = ComfyModel(model, clip)
        patch.check_family(host.family)
        gate = patch_gate(host, patch, low, high)
        patched = gated(host, patch, strength, gate)
        names = printable(", ".join(patch.concepts))
        note = f"forgets {names} at {strength:g} where the prompt is close"
        if patch.info.get("base.fingerprint") != host.fingerprint():
            note += "; trained on another base of this family, so look at the result"
        return io.NodeOutput(patched, ui=told(note))


NODES = [SafeLatentDiffusion, EraseByNegativePrompt, ApplyGatedPatch]
