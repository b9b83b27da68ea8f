"""ESD and its protected variant on real hosts."""

import numpy as np
import pytest
import torch

from .parts import concept, leftovers


@pytest.fixture(scope="module")
def pipeline_model(pack):
    return pack("fmn.hosts.diffusers.model").DiffusersModel.load("demo")


def esd_settings(pack, **more):
    changes = {"steps": 4, "sampling_steps": 4, "seed": 1} | more
    return pack("fmn.methods.esd").Settings(**changes)


@pytest.mark.parametrize("more", [{"erase_from": "a cat"}, {"layers": "x-strict", "protect": True}])
def test_both_hosts_train_the_same_patch(pack, comfy_model, pipeline_model, more):
    """Inside inference mode as in a running server; ComfyUI's model comes back bit by bit."""
    forget, settings = pack("fmn.methods").forget, esd_settings(pack, **more)
    state = comfy_model.patcher.model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    records = []
    for model in (comfy_model, pipeline_model):
        steps = []
        with torch.inference_mode():
            keep = ("a cat",) if settings.protect else ()
            patch = forget(model, [concept(pack)], settings, steps.append, keep)
        records.append((steps[-1].losses, patch))
    (first, one), (second, two) = records
    np.testing.assert_allclose(first, second, rtol=1e-3)
    assert one.info["base.fingerprint"] == two.info["base.fingerprint"]
    assert one.changes.keys() == two.changes.keys()

    after = comfy_model.patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert leftovers(comfy_model.patcher.model) == []
