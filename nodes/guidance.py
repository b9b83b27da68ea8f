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
from ..fmn.hosts.comfyui.unknown_model import host_of
from ..fmn.patches.patch import ForgetPatch
from ..fmn.text import printable
from .common import clip_input, model_input, schema, strength_input
from .page import text_output
from .patch import names_of, other_base_note
from .types import Concepts, Patch

CUSTOM = "custom"
MODES = "replace", "join"


class SafeLatentDiffusion(io.ComfyNode):
    """Steers sampling away from a concept (arXiv 2211.05105), without training and without changing
    weights. Each step takes about half as long again.

    Inputs:
        text: What to leave out, unless concepts are connected. The default is the paper's.
        preset: The paper's four strengths, made for 50 steps; or custom, which uses the five
            numbers below.
        warmup: Custom only. Steps at the start of a run that are not steered, so that the layout
            settles. 0: steer from the start. All of the sampler's steps: never steer.
        scale: Custom only. How fast steering grows with the difference between prompt and concept.
            0: off, and as fast as without this node. 5000, as in max: full strength nearly
            everywhere below the threshold.
        threshold: Custom only. Parts are left alone where the noise prediction for the prompt
            exceeds the concept's by more than this. -100: steer nothing. 0: about half of the
            picture. 1 and more: nearly everything.
        momentum_scale: Custom only. How much of the guidance of earlier steps is added. 0: none. 1:
            all of the momentum.
        momentum_beta: Custom only. How long momentum lasts. 0: one step. Near 1: it builds up
            slowly and stays.
        concepts: What to leave out: their names and aliases replace the text.

    Outputs:
        MODEL: The model, steered away from the concept whenever it samples.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PRESETS["medium"]
        inputs = [
            model_input(),
            clip_input(),
            io.String.Input("text", default=SAFETY_TEXT, multiline=True),
            io.Combo.Input("preset", options=[*PRESETS, CUSTOM], default="medium"),
            io.Int.Input("warmup", default=default.warmup, min=0, max=10000),
            io.Float.Input("scale", default=default.scale, min=0.0, max=1e6, step=10.0),
            io.Float.Input(
                "threshold",
                default=default.threshold,
                min=-100.0,
                max=100.0,
                step=0.005,
                round=False,
            ),
            io.Float.Input(
                "momentum_scale", default=default.momentum_scale, min=0.0, max=1.0, step=0.05
            ),
            io.Float.Input(
                "momentum_beta", default=default.momentum_beta, min=0.0, max=0.999, step=0.05
            ),
            Concepts.Input("concepts", optional=True),
        ]
        outputs = [io.Model.Output()]
        return schema(cls, "FMN_SafeLatentDiffusion", "Safe Latent Diffusion", inputs, outputs)

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
        host, prompt = host_of(model, clip), concept_prompt(concepts, text)
        if settings.scale == 0:
            return io.NodeOutput(model.clone(), ui=text_output("off, as scale is 0"))
        steered = safely_guided(host, host.encode(prompt), settings)
        return io.NodeOutput(steered, ui=text_output(f"steers away from {printable(prompt.text)}"))


class EraseByNegativePrompt(io.ComfyNode):
    """Adds a concept to the negative prompt of every sampler that uses this model. The simplest way
    to leave something out, and just as fast.

    Inputs:
        text: What to leave out, unless concepts are connected.
        mode: replace: the concept replaces your negative prompt, as in the literature. join: it
            follows your own, and both share the attention; not on transformers.
        concepts: What to leave out: their names and aliases replace the text.

    Outputs:
        MODEL: The model, which samples with the concept in its negative prompt.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            model_input(),
            clip_input(),
            io.String.Input("text", default="", multiline=True),
            io.Combo.Input("mode", options=list(MODES), default=MODES[0]),
            Concepts.Input("concepts", optional=True),
        ]
        outputs = [io.Model.Output()]
        return schema(cls, "FMN_EraseByNegativePrompt", "Erase by Negative Prompt", inputs, outputs)

    @classmethod
    def execute(
        cls, model: ModelPatcher, clip: CLIP, text: str, mode: str,
        concepts: Sequence[Concept] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if mode not in MODES:
            raise ForgetError(f"Unknown mode '{mode}': use {' or '.join(MODES)}.")
        host, prompt = host_of(model, clip), concept_prompt(concepts, text)
        steered = erased_by_negative(host, host.encode(prompt), mode == "join")
        return io.NodeOutput(steered, ui=text_output(f"negative prompt: {printable(prompt.text)}"))


class ApplyGatedPatch(io.ComfyNode):
    """Applies a patch only to prompts close to its concepts, so that other prompts draw as before.
    Chain several for several patches.

    Inputs:
        clip: The CLIP that your prompts are encoded with, exactly as used there.
        patch: The patch to apply behind the gate.
        strength: Strength with the gate open. 0: the untouched model. 1: as trained. Above 1:
            forgets more. Below 0: draws towards the concept.
        low: Similarity of prompt and concept at which the gate starts to open. -1: always slightly
            open. Near 1: only for the concept's own words.
        high: Similarity at which the gate is fully open; must be above low. 1: hardly ever fully
            open. Near -1: always open.

    Outputs:
        MODEL: The model with the patch behind its gate. The input does not change.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            model_input(),
            io.Clip.Input("clip"),
            Patch.Input("patch"),
            strength_input(),
            io.Float.Input("low", default=LOW, min=-1.0, max=1.0, step=0.01),
            io.Float.Input("high", default=HIGH, min=-1.0, max=1.0, step=0.01),
        ]
        outputs = [io.Model.Output()]
        return schema(cls, "FMN_ApplyGatedPatch", "Apply Gated Patch", inputs, outputs)

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
