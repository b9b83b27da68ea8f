"""Concept Ablation on real hosts."""

import numpy as np
import pytest
import torch

from .parts import leftovers

KEPT = ("a cow, noto emoji",)


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


def run_in_inference_mode(pack, model, anchor, **more):
    """Losses and patch, as in a running server."""
    method, steps = pack("fmn.methods.ablation"), []
    settings = method.Settings(steps=4, batch=2, samples=2, sample_steps=10, seed=1, **more)
    concept = pack("fmn.concepts.concept").Concept(
        "dog", anchor=anchor, prompts=("a dog, noto emoji",)
    )
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(model, [concept], settings, steps.append, KEPT)
    return steps[-1].losses, patch


@pytest.mark.parametrize(
    "more", [{"references": "zeros"}, {"prior": 0.5, "teacher": "current", "full_weights": True}]
)
def test_both_hosts_train_the_same_patch(pack, comfy_model, pipeline_model, more):
    """ComfyUI's model comes back bit by bit. The hosts' own pictures differ by float rounding."""
    state = comfy_model.patcher.model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    (first, one), (second, two) = (
        run_in_inference_mode(pack, model, "cat", **more) for model in (comfy_model, pipeline_model)
    )
    np.testing.assert_allclose(first, second, rtol=1e-2)
    assert one.info["base.fingerprint"] == two.info["base.fingerprint"]
    assert one.changes.keys() == two.changes.keys()

    after = comfy_model.patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(comfy_model.patcher.model) == []


@pytest.mark.parametrize("no_anchor", ["empty", "rest"])
def test_without_an_anchor(pack, comfy_model, no_anchor):
    losses, patch = run_in_inference_mode(pack, comfy_model, "", no_anchor=no_anchor)
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert any(up.any() for up, _ in patch.changes.values())
