"""Guidance under rectified flow: the demo transformer, and tiny models with masks."""

import pytest
import torch

from .others import CONFIGS, Words, make
from .test_guidance import (
    CFG,
    CONCEPT,
    PROMPT,
    STEPS,
    assert_safe,
    conditioning,
    first_noise,
    negative,
    recorded,
    refused,
    safe,
    sample,
)


@pytest.fixture(scope="module")
def flow(pack):
    with torch.inference_mode():
        return pack("nodes.demo").load_demo_transformer()


@pytest.fixture
def nodes(pack):
    return pack("nodes.guidance")


@pytest.fixture
def texts(flow):
    with torch.inference_mode():
        return {text: conditioning(flow[1], text) for text in (PROMPT, CONCEPT, "", "a cat")}


@pytest.mark.parametrize("cfg", [1.0, CFG])
def test_safe_prediction_follows_the_equations_on_velocities(nodes, flow, texts, cfg):
    """The guided velocity of every step, from three predictions made one by one."""
    rows = []
    model = recorded(safe(nodes, flow), texts, rows)
    sample(model, texts[PROMPT], texts[""], first_noise(2), cfg)
    assert len(rows) == STEPS
    assert_safe(rows, cfg)


def test_the_negative_prompt_is_replaced_and_never_joined(pack, nodes, flow, texts):
    replaced = sample(negative(nodes, flow, "replace"), texts[PROMPT], texts["a cat"])
    assert torch.equal(replaced, sample(flow[0], texts[PROMPT], texts[CONCEPT]))
    assert not torch.equal(replaced, sample(flow[0], texts[PROMPT], texts["a cat"]))
    with refused(pack, "the negative prompt is left out: set cfg above 1"):
        sample(negative(nodes, flow, "replace"), texts[PROMPT], texts["a cat"], cfg=1.0)
    with refused(pack, "Flux.1 cannot be joined: use mode replace"):
        negative(nodes, flow, "join")


@pytest.mark.parametrize("name", CONFIGS)
def test_all_that_a_text_encoder_gives_is_replaced(pack, name):
    """Masks, token ids and further texts too, and nothing else."""
    host = pack("fmn.hosts.comfyui.unknown_model").host_of(make(name, {}), Words(name))
    reworded = pack("fmn.hosts.comfyui.sampling_wrappers").reworded
    prompt = pack("fmn.concepts.concept").Prompt
    ours, theirs = (host.encode(prompt(text, "")) for text in ("a cat here", "a dog"))
    more = {"guidance": 3.5, "model_conds": {}, "uuid": 1}
    cond = {"cross_attn": theirs.context} | theirs.vectors | more
    (found,) = reworded([cond, dict(cond)], ours)
    expected = {"cross_attn": ours.context} | ours.vectors
    assert found.keys() == cond.keys() and found["guidance"] == 3.5 and found["uuid"] != 1
    for key, value in expected.items():
        assert torch.equal(found[key], value)
