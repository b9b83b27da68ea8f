"""Patches behind a gate: linear in it, each by itself, off for foreign prompts."""

import pytest
import torch
from torch import nn

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.guidance.prompt_gate import Gate, Gated, patch_gate, subjects_of
from fmn.models.adapters import FixedAdapter, attached

from ..tiny import TINY, TinyModel, make_patch


def factors(seed, module, rank=2):
    generator = torch.Generator().manual_seed(seed)
    out, *inputs = module.weight.shape
    up = torch.randn(out, rank, *[1] * (len(inputs) - 1), generator=generator)
    return up, torch.randn(rank, *inputs, generator=generator)


LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 7, 6)),
    "linear without tokens": (nn.Linear(6, 5), (3, 6)),
    "convolution": (nn.Conv2d(6, 5, 3, padding=1), (3, 6, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_patch_has_its_own_gate_and_there_are_no_cross_terms(name):
    """Rows of W x + sum_i g_i s_i up_i (down_i x), by the merged weights."""
    module, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gates = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.0, 0.75]])
    strengths = 1.0, -0.5
    pairs = [factors(seed, module) for seed in (1, 2)]
    merged = [torch.einsum("or,r...->o...", up.flatten(1), down) for up, down in pairs]

    first, second = (
        {"layer": Gated(FixedAdapter([(*pair, strength)], "cpu"), gate)}
        for pair, strength, gate in zip(pairs, strengths, gates)
    )
    with torch.no_grad(), attached(first, lambda _: module), attached(second, lambda _: module):
        found = module(x)
    assert not module._forward_hooks

    weight = module.weight.detach().clone()
    for row in range(len(x)):
        total = sum(g[row] * s * m for g, s, m in zip(gates, strengths, merged))
        with torch.no_grad():
            expected = torch.func.functional_call(
                module, {"weight": weight + total, "bias": module.bias}, x[row : row + 1]
            )
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_rows_that_attention_has_tiled_keep_their_samples_gate():
    module = nn.Linear(6, 5)
    adapter = FixedAdapter([(*factors(1, module), 1.0)], "cpu")
    x = torch.randn(6, 2, 6)
    found = Gated(adapter, torch.tensor([0.0, 1.0]))(module, x)
    assert not found[:3].any()
    assert torch.equal(found[3:], adapter(module, x)[3:])


def test_hooks_come_off_after_an_error():
    module = nn.Linear(6, 5)
    worn = {"layer": Gated(FixedAdapter([(*factors(1, module), 1.0)], "cpu"), torch.ones(1))}
    with pytest.raises(KeyError), attached(worn, lambda _: module):
        raise KeyError
    assert not module._forward_hooks


def test_closeness_is_the_mean_best_cosine_less_the_empty_prompt():
    """Written out with loops."""
    generator = torch.Generator().manual_seed(0)
    empty = torch.randn(77, 8, generator=generator)
    probes = [torch.randn(k, 8, generator=generator) for k in (1, 3)]
    context = torch.randn(2, 154, 8, generator=generator)
    found = Gate(probes, empty).closeness(context)
    for row, score in zip(context, found):
        scores = []
        for probe in probes:
            best = [
                max(
                    torch.cosine_similarity(token, row[j] - empty[j % 77], 0).item()
                    for j in range(154)
                )
                for token in probe
            ]
            scores.append(sum(best) / len(best))
        assert score.item() == pytest.approx(max(scores), abs=1e-5)


def test_gate_is_a_ramp_and_zero_for_the_empty_prompt():
    empty = torch.randn(77, 4, generator=torch.Generator().manual_seed(0))
    gate = Gate([torch.tensor([[1.0, 0, 0, 0]])], empty, low=0.5, high=0.9)
    rows = empty.repeat(5, 1, 1)
    for row, cosine in enumerate((0.4, 0.5, 0.7, 0.9)):
        rows[row, 3, 0] += cosine
        rows[row, 3, 1] += (1 - cosine**2) ** 0.5
    torch.testing.assert_close(gate(rows), torch.tensor([0.0, 0, 0.5, 1, 0]), atol=1e-5, rtol=0)
    assert gate.closeness(rows)[4] == 0
    # Noise of a 16-bit encoder in place of words opens nothing.
    noise = 1e-4 * torch.randn(1, 77, 4, generator=torch.Generator().manual_seed(1))
    assert gate.closeness(empty + noise).abs() < 0.1
    # Weights scale a word's vector, not its direction.
    rows = empty.repeat(2, 1, 1)
    rows[0, 3] += torch.tensor([0.7, 0.3, 0, 0])
    rows[1, 3] += 1.4 * torch.tensor([0.7, 0.3, 0, 0])
    strong, stronger = gate.closeness(rows)
    assert float(strong) == pytest.approx(float(stronger), abs=1e-5)


@pytest.mark.parametrize("low, high", [(0.9, 0.9), (0.9, 0.5), (-2, 0.5), (0.5, float("nan"))])
def test_thresholds_out_of_order_are_refused(low, high):
    with pytest.raises(ForgetError, match="The gate opens from"):
        Gate([torch.ones(1, 4)], torch.ones(77, 4), low, high)


def concepts(**more):
    return [{"name": "big dog", "kind": "object", "aliases": ["puppy"], "prompts": []} | more]


def test_a_patchs_names_and_aliases_open_its_gate():
    """In the tiny encoder a token depends on word and place alone."""
    model = TinyModel()
    patch = make_patch(TINY, rank=1)
    patch.info["concepts"] = concepts()
    gate = patch_gate(model, patch)
    texts = [
        "a photo of big dog",
        "a photo of puppy",
        "big dog here",
        "puppy",
        "a photo of cat",
        "",
    ]
    opened = gate(model.encode_all(texts))
    assert opened[:4].tolist() == [1.0] * 4
    assert opened[4:].tolist() == [0.0] * 2


def test_a_patchs_record_is_text_and_nothing_else():
    patch = make_patch(TINY, rank=1)
    patch.info["concepts"] = concepts(kind="no kind of ours", aliases=["{0.__class__}"])
    assert subjects_of(patch) == [
        ("big dog", "no kind of ours"), ("{0.__class__}", "no kind of ours"),
    ]  # fmt: skip
    patch_gate(TinyModel(), patch)
    for aliases in ("puppy", [3]):
        patch.info["concepts"] = concepts(aliases=aliases)
        with pytest.raises(ForgetError, match="aliases is damaged"):
            subjects_of(patch)
    patch.info["concepts"] = []
    with pytest.raises(ForgetError, match="does not say what it forgets"):
        subjects_of(patch)


def test_a_category_of_unsafe_content_opens_for_each_of_its_terms():
    patch = make_patch(concepts=[Concept("nudity", "unsafe")])
    words = [word for word, _ in subjects_of(patch)]
    assert words == list(Concept("nudity", "unsafe").subjects) and "naked" in words
