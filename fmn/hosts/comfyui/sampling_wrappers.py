"""Guidance and gated patches in ComfyUI: wrappers around one sampling run of a cloned MODEL.

State lives in a run's copy of the model's options, so the MODEL keeps nothing and each run starts
afresh.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...errors import ForgetError
from ...guidance.prompt_gate import Gated
from ...guidance.safe_latent_diffusion import SafeGuidance, SafeSettings, step_of
from ...models.adapters import FixedAdapter, attached
from ...models.interface import Text
from ...patches.patch import ForgetPatch
from ...text import printable
from .host import ComfyHost

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

SAFE = "fmn_safe_latent_diffusion"
NEGATIVE = "fmn_erase_by_negative_prompt"
GATED = "fmn_gated_patch"
TEXT = "cross_attn", "pooled_output"

Conds = list[dict[str, Any]]  # ComfyUI's conditions of one branch


def _around_runs(
    patcher: ModelPatcher, key: str, prepare: Callable[[CFGGuider, Tensor], None]
) -> ModelPatcher:
    """A clone that calls ``prepare(guider, sigmas)`` before each sampling run."""
    clone = patcher.clone()
    if clone.get_wrappers(WrappersMP.OUTER_SAMPLE, key) and key != GATED:
        raise ForgetError(
            "The model went through this node before: name all concepts in one node of this kind."
        )

    def outer_sample(executor, noise, latent, sampler, sigmas, *args, **kwargs):
        prepare(executor.class_obj, sigmas)
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
    return clone


def _wrap(guider: CFGGuider, kind: str, key: str, function: Callable[..., Any]) -> None:
    add_wrapper_with_key(kind, key, function, guider.model_options, is_model_options=True)


def safely_guided(host: ComfyHost, text: Text, settings: SafeSettings) -> ModelPatcher:
    """A clone of the MODEL that samples with Safe Latent Diffusion.

    Args:
        text: names the concept, [1, T, D].
    """

    def prepare(guider, sigmas):
        run = _SafeRun(guider, SafeGuidance(settings), sigmas.tolist())
        guider.conds[SAFE] = reworded(guider.conds.get("positive", []), text)
        guider.model_options["disable_cfg1_optimization"] = True  # gamma needs eps_0
        _wrap(guider, WrappersMP.CALC_COND_BATCH, SAFE, run.predict)
        _wrap(guider, WrappersMP.PREDICT_NOISE, SAFE, run.check)

    return _around_runs(host.patcher, SAFE, prepare)


class _SafeRun:
    """Safe Latent Diffusion in one sampling run of a guider."""

    def __init__(self, guider: CFGGuider, guidance: SafeGuidance, sigmas: list[float]) -> None:
        self.guider, self.guidance, self.sigmas = guider, guidance, sigmas
        self.guided = False

    def predict(self, executor, model, conds, x, timestep, options):
        """Predictions for prompt and unconditional branch, the former made safe.

        ComfyUI's predictions are clean latents, x - sigma eps, whatever the model predicts
        natively, with the velocity of flow models for eps; eps - gamma is then clean + sigma gamma.
        """
        branches = self.guider.conds
        pair = branches.get("positive"), branches.get("negative")
        is_pair = len(conds) == 2 and conds[1] and all(a is b for a, b in zip(conds, pair))
        self.guided |= bool(is_pair)
        step = step_of(float(timestep[0]), self.sigmas)
        if not is_pair or self.guidance.idle(step):
            return executor(model, conds, x, timestep, options)
        # One call, so that core puts all three into one batch if memory allows.
        clean = executor(model, [*conds, branches[SAFE]], x, timestep, options)
        sigma = timestep.view(-1, *[1] * (x.dim() - 1))
        text, empty, concept = ((x - part) / sigma for part in clean)
        gamma = self.guidance(step, text, concept, empty)
        return [clean[0] + sigma * gamma, clean[1]]

    def check(self, executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        if not self.guided:
            raise ForgetError(
                f"Safe Latent Diffusion cannot work with {type(self.guider).__name__}, which does "
                "not predict for one positive and one negative prompt together: use KSampler, "
                "SamplerCustom or CFGGuider."
            )
        return out


def erased_by_negative(host: ComfyHost, text: Text, join: bool) -> ModelPatcher:
    """A clone of the MODEL whose unconditional branch reads the concept's text.

    Args:
        text: names the concept, [1, T, D].
        join: put the text behind the user's negative prompt, not in its place.
    """

    if join and text.alone:
        raise ForgetError(
            f"The texts of {host.family.title} cannot be joined: use mode replace, with your own "
            "negative prompt behind the concept."
        )

    def prepare(guider, sigmas):
        negative = guider.conds.get("negative")
        if negative is not None:
            guider.conds["negative"] = (
                [_appended(cond, text) for cond in negative] if join else reworded(negative, text)
            )

        def predict(executor, model, conds, *args):
            positive = guider.conds.get("positive")
            if len(conds) == 2 and conds[0] is positive and not conds[1]:
                raise ForgetError(
                    "Erasing by negative prompt has no effect here, as the negative prompt is left "
                    "out: set cfg above 1, and use a sampler node that takes a negative prompt."
                )
            return executor(model, conds, *args)

        _wrap(guider, WrappersMP.CALC_COND_BATCH, NEGATIVE, predict)

    return _around_runs(host.patcher, NEGATIVE, prepare)


def reworded(conds: Conds, text: Text) -> Conds:
    """The same conditions (regions, times, ControlNets, LoRA hooks) with another text.

    Conditions that differed only in their texts become one.
    """
    textless: Conds = []
    for cond in conds:
        known = (*TEXT, *text.vectors, "uuid")
        rest = {key: value for key, value in cond.items() if key not in known}
        if not any(_equal(rest, other) for other in textless):
            textless.append(rest)
    words = {"cross_attn": text.context} | text.vectors
    if "pooled" in words:
        words["pooled_output"] = words.pop("pooled")
    return [rest | words | {"uuid": uuid.uuid4()} for rest in textless]


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        first[key] is second[key] or (key == "model_conds" and not first[key] and not second[key])
        for key in first
    )


def _appended(cond: dict[str, Any], text: Text) -> dict[str, Any]:
    context = cond["cross_attn"]
    concept = text.context.to(context).expand(len(context), -1, -1)
    return cond | {"cross_attn": torch.cat([context, concept], 1), "uuid": uuid.uuid4()}


def gated(
    host: ComfyHost, patch: ForgetPatch, strength: float, gate: Callable[[Tensor], Tensor]
) -> ModelPatcher:
    """A clone of the MODEL to which a patch is applied as far as each prompt opens its gate.

    The patch is added to the layers' outputs while the U-Net runs; no weight changes. Rows of the
    batch (positive and negative prompts, regions) have a gate each.

    Args:
        gate: function from encoded prompts [B, T, D] to [B] in 0..1; ``prompt_gate.Gate``.
    """
    if patch.changes_text:
        raise ForgetError(
            "This patch changes the text encoder, whose words would no longer be those that open "
            "the gate: use Apply Forget Patch."
        )
    host.check_fits(patch)
    names = printable(", ".join(patch.concepts))

    def prepare(guider, sigmas):
        device = guider.model_patcher.load_device
        adapters = {
            name: FixedAdapter([(up, down, strength)], device)
            for name, (up, down) in patch.changes.items()
        }
        logged = False

        def module_of(name):
            return guider.model_patcher.model.get_submodule(host.key(name).removesuffix(".weight"))

        def apply_model(executor, x, t, c_concat, c_crossattn, *args, **kwargs):
            nonlocal logged
            amount = gate(c_crossattn)
            if not logged:
                opened = ", ".join(f"{part:.2f}" for part in amount.tolist())
                logging.info("Forget-Me-Not: gate of the patch for %s, a row: %s", names, opened)
                logged = True
            amount = amount.to(x.device)
            if not amount.any():
                return executor(x, t, c_concat, c_crossattn, *args, **kwargs)
            gated_adapters = {name: Gated(adapter, amount) for name, adapter in adapters.items()}
            with attached(gated_adapters, module_of):
                return executor(x, t, c_concat, c_crossattn, *args, **kwargs)

        _wrap(guider, WrappersMP.APPLY_MODEL, GATED, apply_model)

    return _around_runs(host.patcher, GATED, prepare)
