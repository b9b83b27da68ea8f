"""Re-read on diffusion transformers: ComfyUI's own classes, tiny and with random weights.

The text side is a mock, ``others.Words``: random conditioning in the shape that the model's own
text encoders give.
"""

import pytest
import torch

from .parts import concept


def reread_settings(pack, **more):
    changes = {"prompts": 2, "keep_prompts": 6, "query_positions": 4, "size": 64, "passes": 2}
    return pack("fmn.methods.reread.settings").Settings(**changes | more)


@pytest.mark.parametrize(("name", "layers"), [("Flux", 4), ("SD3", 3), ("Lumina2", 1)])
def test_reread_solves_from_recorded_rows(pack, other_host, name, layers):
    model = other_host(name)
    before = {key: value.clone() for key, value in model.patcher.model.state_dict().items()}
    steps = []
    with torch.inference_mode():
        patch = pack("fmn.methods").forget(
            model, [concept(pack)], reread_settings(pack), steps.append
        )
    assert len(patch.changes) == layers and patch.info["loss"]["last"] < 0.9
    after = model.patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(m._forward_hooks for m in model.patcher.model.modules())
    assert [step.index for step in steps] == list(range(1, steps[0].total + 1))
