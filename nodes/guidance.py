"""Forgetting while sampling: guidance away from a concept, and patches behind a gate."""

from collections.abc import Sequence

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..fmn.concepts.concept import Concept
from ..fmn.errors import ForgetError
from ..fmn.guidance.prompt_gate import HIGH, LOW, patch_gate
from ..fmn.guidance.safe_latent_diffusion import PRESETS, SAFETY_TEXT, SafeSettings, concept_prompt
from ..fmn.hosts.comfyui.model import ComfyModel
from ..fmn.hosts.comfyui.sampling_wrappers import erased_by_negative, gated, safely_guided
from ..fmn.patches.patch import ForgetPatch
from ..fmn.text import printable
from .common import clip_input, model_input, strength_input
from .page import text_output
from .patch import names_of, other_base_note
from .types import CATEGORY, Concepts, Patch

CUSTOM = "custom"
MODES = "replace", "join"


def _text_input(default: str, note: str = "") -> io.Input:
    return io.String.Input(
        "text",
        default=default,
        multiline=True,
        tooltip=f"What to leave out, unless concepts are connected.{note}",
    )


def _concepts_input() -> io.Input:
    return Concepts.Input(
        "concepts",
        optional=True,
        tooltip="What to leave out: their names and aliases replace the text.",
    )


class SafeLatentDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_SafeLatentDiffusion",
            display_name="Safe Latent Diffusion",
            category=CATEGORY,
            description="Steers sampling away from a concept (arXiv 2211.05105), without training "
            "and without changing weights. Each step takes about half as long again.",
            inputs=[
                model_input(),
                clip_input(),
                _text_input(SAFETY_TEXT, " The default is the paper's."),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM],
                    default="medium",
                    tooltip="The paper's four strengths, made for 50 steps; or custom, which uses "
                    "the five numbers below.",
                ),
                *_custom_inputs(PRESETS["medium"]),
                _concepts_input(),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model, steered away from the concept whenever it samples."
                )
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, text: str, preset: str, warmup: int, scale: float,
        threshold: float, momentum_scale: float, momentum_beta: float,
        concepts: Sequence[Concept] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if preset == CUSTOM:
            settings = SafeSettings(warmup, scale, threshold, momentum_scale, momentum_beta)
        elif preset in PRESETS:
            settings = PRESETS[preset]
        else:
            raise ForgetError(f"Unknown preset '{preset}': use {', '.join(PRESETS)} or {CUSTOM}.")
        host, prompt = ComfyModel(model, clip), concept_prompt(concepts, text)
        if settings.scale == 0:
            return io.NodeOutput(model.clone(), ui=text_output("off, as scale is 0"))
        steered = safely_guided(host, host.encode(prompt), settings)
        return io.NodeOutput(steered, ui=text_output(f"steers away from {printable(prompt.text)}"))


def _custom_inputs(default: SafeSettings) -> list[io.Input]:
    return [
        io.Int.Input(
            "warmup",
            default=default.warmup,
            min=0,
            max=10000,
            tooltip="Custom only. Steps at the start of a run that are not steered, so that the "
            "layout settles. 0: steer from the start. All of the sampler's steps: never steer.",
        ),
        io.Float.Input(
            "scale",
            default=default.scale,
            min=0.0,
            max=1e6,
            step=10.0,
            tooltip="Custom only. How fast steering grows with the difference between prompt and "
            "concept. 0: off, and as fast as without this node. 5000, as in max: full strength "
            "nearly everywhere below the threshold.",
        ),
        io.Float.Input(
            "threshold",
            default=default.threshold,
            min=-100.0,
            max=100.0,
            step=0.005,
            round=False,
            tooltip="Custom only. Parts are left alone where the noise prediction for the prompt "
            "exceeds the concept's by more than this. -100: steer nothing. 0: about half of the "
            "picture. 1 and more: nearly everything.",
        ),
        io.Float.Input(
            "momentum_scale",
            default=default.momentum_scale,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Custom only. How much of the guidance of earlier steps is added. 0: none. 1: "
            "all of the momentum.",
        ),
        io.Float.Input(
            "momentum_beta",
            default=default.momentum_beta,
            min=0.0,
            max=0.999,
            step=0.05,
            tooltip="Custom only. How long momentum lasts. 0: one step. Near 1: it builds up "
            "slowly and stays.",
        ),
    ]


class EraseByNegativePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_EraseByNegativePrompt",
            display_name="Erase by Negative Prompt",
            category=CATEGORY,
            description="Adds a concept to the negative prompt of every sampler that uses this "
            "model. The simplest way to leave something out, and just as fast.",
            inputs=[
                model_input(),
                clip_input(),
                _text_input(""),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MODES[0],
                    tooltip="replace: the concept replaces your negative prompt, as in the "
                    "literature. join: it follows your own, and both share the attention.",
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
    def execute(
        cls, model: ModelPatcher, clip: CLIP, text: str, mode: str,
        concepts: Sequence[Concept] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if mode not in MODES:
            raise ForgetError(f"Unknown mode '{mode}': use {' or '.join(MODES)}.")
        host, prompt = ComfyModel(model, clip), concept_prompt(concepts, text)
        steered = erased_by_negative(host, host.encode(prompt), mode == "join")
        return io.NodeOutput(steered, ui=text_output(f"negative prompt: {printable(prompt.text)}"))


class ApplyGatedPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FMN_ApplyGatedPatch",
            display_name="Apply Gated Patch",
            category=CATEGORY,
            description="Applies a patch only to prompts close to its concepts, so that other "
            "prompts draw as before. Chain several for several patches.",
            inputs=[
                model_input(),
                clip_input("The CLIP that your prompts are encoded with, exactly as used there."),
                Patch.Input("patch", tooltip="The patch to apply behind the gate."),
                strength_input(
                    "Strength with the gate open. 0: the untouched model. 1: as trained. Above 1: "
                    "forgets more. Below 0: draws towards the concept."
                ),
                io.Float.Input(
                    "low",
                    default=LOW,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Similarity of prompt and concept at which the gate starts to open. "
                    "-1: always slightly open. Near 1: only for the concept's own words.",
                ),
                io.Float.Input(
                    "high",
                    default=HIGH,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Similarity at which the gate is fully open; must be above low. 1: "
                    "hardly ever fully open. Near -1: always open.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model with the patch behind its gate. The input does not change."
                )
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, patch: ForgetPatch, strength: float, low: float,
        high: float,
    ) -> io.NodeOutput:  # fmt: skip
        host = ComfyModel(model, clip)
        patch.check_family(host.family)
        patched = gated(host, patch, strength, patch_gate(host, patch, low, high))
        note = f"forgets {names_of(patch)} at strength {strength:g} where the prompt is close"
        return io.NodeOutput(patched, ui=text_output(note + other_base_note(host, patch)))


NODES = [SafeLatentDiffusion, EraseByNegativePrompt, ApplyGatedPatch]
