"""The hardest embedding against the paper's formula, written out."""

import pytest
import torch

from fmn.closed_form.adversarial_embedding import grams, hardest, hardest_contexts
from fmn.errors import ForgetError
from fmn.models.adapters import FixedAdapter, attached
from fmn.models.families import DEMO, layers

from ..tiny import TINY, TinyModel, make_patch, same_tensors, weights_of

KEYS_AND_VALUES = [layer.name for layer in layers(TINY) if layer.is_key_or_value]


def contexts(tokens=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, TINY.context_dim, generator=generator)


def pairs(model, patches):
    """(W_l, W'_l) of every key and value, in float64, the change written out in full."""
    found = []
    for name in KEYS_AND_VALUES:
        weight = model.unet.get_submodule(name).weight.detach().double()
        changed = weight.clone()
        for patch, strength in patches:
            if name in patch.changes:
                up, down = patch.changes[name]
                changed += strength * up.double() @ down.double()
        found.append((weight, changed))
    return found


def literal(pairs, c, r):
    """c' of one token [D]: (r I + sum W'^T W')^-1 (sum W'^T W) c."""
    size = len(c)
    left = r * torch.eye(size, dtype=torch.float64)
    right = torch.zeros(size, dtype=torch.float64)
    for weight, changed in pairs:
        left += changed.T @ changed
        right += changed.T @ weight @ c.double()
    return torch.inverse(left) @ right


def two_patches():
    """Both change the second and third layer; one has no others."""
    some = make_patch(
        TINY, rank=1, size=0.3, seed=1, scope=lambda layer: layer.name in KEYS_AND_VALUES[1:3]
    )
    return [(make_patch(TINY, rank=2, size=0.3), 0.7), (some, -1.5)]


def solve(model, patches, c, r=0.1):
    with model.borrow_denoiser() as denoiser:
        return hardest(denoiser, TINY, patches, c, r)


@pytest.mark.parametrize("r", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("count", [1, 2])
def test_every_token_is_the_formulas(r, count):
    model, patches, c = TinyModel(), two_patches()[:count], contexts()
    found = solve(model, patches, c, r)
    expected = torch.stack([literal(pairs(model, patches), token, r) for token in c])
    assert found.contexts.dtype == torch.float64
    torch.testing.assert_close(found.contexts, expected, rtol=1e-9, atol=1e-9)


def test_sums_are_those_of_whole_matrices():
    model, patches = TinyModel(), two_patches()
    with model.borrow_denoiser() as denoiser:
        _, gram, cross = grams(denoiser, TINY, patches)
        _, bare_gram, bare_cross = grams(denoiser, TINY, [])
    both = pairs(model, patches)
    torch.testing.assert_close(gram, sum(changed.T @ changed for _, changed in both))
    torch.testing.assert_close(cross, sum(changed.T @ weight for weight, changed in both))
    torch.testing.assert_close(bare_gram, sum(weight.T @ weight for weight, _ in both))
    assert torch.equal(bare_gram, bare_cross)


def test_distances_are_those_of_keys_and_values():
    model, patches, c = TinyModel(), two_patches(), contexts()
    found = solve(model, patches, c, 0.01)
    both, total = pairs(model, patches), 0.0
    squared = {"before": 0.0, "after": 0.0}
    for weight, changed in both:
        wanted = c.double() @ weight.T
        total += wanted.square().sum()
        for key, text in (("before", c.double()), ("after", found.contexts)):
            squared[key] += (text @ changed.T - wanted).square().sum()
    assert found.before == pytest.approx(float((squared["before"] / total).sqrt()), rel=1e-9)
    assert found.after == pytest.approx(float((squared["after"] / total).sqrt()), rel=1e-9)
    assert 0 < found.after < found.before


def test_no_other_text_is_nearer():
    """A least-squares solution: every small step away from it is worse."""
    model, patches, c = TinyModel(), two_patches(), contexts(1)
    found, both, r = solve(model, patches, c, 0.1).contexts[0], pairs(model, two_patches()), 0.1

    def objective(text):
        errors = [(new @ text - old @ c[0].double()).square().sum() for old, new in both]
        return float(sum(errors) + r * text.square().sum())

    for direction in torch.eye(TINY.context_dim, dtype=torch.float64):
        for step in (1e-3, -1e-3):
            assert objective(found + step * direction) > objective(found)


def test_a_change_that_every_layer_shares_is_undone():
    """W' = W (I + E): c' = (I + E)^-1 c, up to r."""
    model, c = TinyModel(), contexts()
    direction = torch.randn(1, TINY.context_dim, generator=torch.Generator().manual_seed(5)) * 0.3
    towards = torch.randn(TINY.context_dim, 1, generator=torch.Generator().manual_seed(6)) * 0.3
    patch = make_patch(TINY, rank=1)
    with torch.no_grad():
        for name in KEYS_AND_VALUES:
            weight = model.unet.get_submodule(name).weight
            patch.changes[name] = (weight @ towards, direction)
    found = solve(model, [(patch, 1.0)], c, 1e-9)
    mixing = torch.eye(TINY.context_dim, dtype=torch.float64) + (towards @ direction).double()
    expected = torch.linalg.solve(mixing, c.double().T).T
    torch.testing.assert_close(found.contexts, expected, rtol=1e-5, atol=1e-5)
    assert found.before > 0.05 and found.after < 1e-5


def test_patched_layers_give_what_the_distance_says():
    """Through the model's own modules, with the patch attached as elsewhere."""
    model, c = TinyModel(), contexts()
    patch = make_patch(TINY, rank=2, size=0.3)
    found = solve(model, [(patch, 1.0)], c)
    text, squared, total = found.contexts.float(), 0.0, 0.0
    with model.borrow_denoiser() as denoiser, torch.no_grad():
        wanted = [denoiser.module(name)(c) for name in KEYS_AND_VALUES]
        worn = {
            name: FixedAdapter([(*patch.changes[name], 1.0)], "cpu") for name in KEYS_AND_VALUES
        }
        with attached(worn, denoiser.module):
            for name, target in zip(KEYS_AND_VALUES, wanted):
                squared += float((denoiser.module(name)(text) - target).square().sum())
                total += float(target.square().sum())
    assert (squared / total) ** 0.5 == pytest.approx(found.after, rel=1e-4)


def test_batches_keep_their_shape_and_a_large_r_gives_zero():
    model, patches, c = TinyModel(), two_patches(), contexts(6)
    flat = solve(model, patches, c).contexts
    assert torch.equal(solve(model, patches, c.view(2, 3, -1)).contexts, flat.view(2, 3, -1))
    assert solve(model, patches, c, 1e12).contexts.abs().max() < 1e-6


def test_the_model_is_not_touched():
    model = TinyModel()
    before = weights_of(model.unet)
    solve(model, two_patches(), contexts())
    assert same_tensors(weights_of(model.unet), before)


def test_layers_beyond_keys_and_values_do_not_count():
    model, c = TinyModel(), contexts()
    patch = make_patch(TINY, rank=2, size=0.3)
    more = make_patch(TINY, rank=2, size=0.3, scope=lambda layer: layer.is_cross_attention)
    more.changes |= patch.changes
    assert torch.equal(
        solve(model, [(patch, 1.0)], c).contexts, solve(model, [(more, 1.0)], c).contexts
    )
    queries = make_patch(TINY, scope=lambda layer: layer.name.endswith("attn2.to_q"))
    for worn in ([(queries, 1.0)], [(patch, 0.0)], []):
        with pytest.raises(ForgetError, match="no keys or values"):
            solve(model, worn, c)


@pytest.mark.parametrize("r", [0.0, -1.0, float("nan"), float("inf")])
def test_r_has_to_be_above_zero(r):
    gram = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ForgetError, match="r is"):
        hardest_contexts(gram, gram, torch.ones(1, 2), r)


def test_a_patch_of_another_family_is_refused():
    with pytest.raises(ForgetError, match="use a patch made for the model's family"):
        solve(TinyModel(), [(make_patch(DEMO), 1.0)], contexts())
