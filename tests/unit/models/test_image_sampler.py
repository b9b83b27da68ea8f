"""Patches applied and taken off while a sampler is open."""

import pytest
import torch

from fmn.errors import ForgetError
from fmn.linalg import full_change
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling

from ..tiny import TINY, TinyModel, make_patch, same_tensors, traces, weights_of

PROMPTS, SEEDS = ["a dog", "a cat here"], [1, 2]


def patch_of(seed=0, size=0.2):
    return make_patch(TINY, seed=seed, size=size)


def sampler_of(model, batch=16, on_pictures=lambda count: None):
    return open_sampler(model, Sampling(3, 2.0), batch, on_pictures)


def latents(sampler):
    return sampler.latents(sampler.texts(PROMPTS), sampler.noise(SEEDS))


def plain_latents(model=None):
    with sampler_of(model or TinyModel()) as sampler:
        return latents(sampler)


def merged_latents(*patches):
    """What a model gives whose weights hold the patches."""
    model = TinyModel()
    with torch.no_grad():
        for patch, strength in patches:
            for name, factors in patch.changes.items():
                model.unet.get_submodule(name).weight += strength * full_change(*factors)
    return plain_latents(model)


def close(first, second):
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_applied_is_merged(strength):
    patch = patch_of()
    with sampler_of(TinyModel()) as sampler, sampler.applying([(patch, strength)]):
        applied = latents(sampler)
    assert close(applied, merged_latents((patch, strength)))
    assert not close(applied, plain_latents())


def test_several_patches_and_nested_applying_add_up():
    first, second, third = patch_of(0), patch_of(1), patch_of(2)
    with sampler_of(TinyModel()) as sampler:
        with sampler.applying([(first, 1.0), (second, 0.5)]):
            two = latents(sampler)
            with sampler.applying([(third, 1.0)]):
                three = latents(sampler)
            assert torch.equal(latents(sampler), two)
        assert torch.equal(latents(sampler), plain_latents())
    assert close(two, merged_latents((first, 1.0), (second, 0.5)))
    assert close(three, merged_latents((first, 1.0), (second, 0.5), (third, 1.0)))
    assert not close(two, three)


def test_a_patch_and_its_negation_cancel():
    patch = patch_of()
    with sampler_of(TinyModel()) as sampler, sampler.applying([(patch, 1.0), (patch, -1.0)]):
        assert close(latents(sampler), plain_latents())


def test_strength_zero_is_nothing():
    with sampler_of(TinyModel()) as sampler, sampler.applying([(patch_of(), 0.0)]):
        assert torch.equal(latents(sampler), plain_latents())


def test_bare_is_untouched_for_a_while_also_nested():
    plain, both = plain_latents(), [(patch_of(0), 1.0), (patch_of(1), 1.0)]
    with sampler_of(TinyModel()) as sampler, sampler.applying(both[:1]), sampler.applying(both[1:]):
        applied = latents(sampler)
        with sampler.unpatched():
            assert torch.equal(latents(sampler), plain)
            with sampler.unpatched():
                assert torch.equal(latents(sampler), plain)
            assert torch.equal(latents(sampler), plain)
            with sampler.applying([(patch_of(2), 1.0)]):
                anew = latents(sampler)
        assert torch.equal(latents(sampler), applied)
    assert close(anew, merged_latents((patch_of(2), 1.0)))


def fail():
    raise RuntimeError("a fault")


@pytest.mark.parametrize("bare", [False, True])
def test_an_error_inside_restores_everything(bare):
    model = TinyModel()
    before = weights_of(model.unet)
    with sampler_of(model) as sampler:
        with pytest.raises(RuntimeError, match="a fault"), sampler.applying([(patch_of(), 1.0)]):
            if bare:
                with sampler.unpatched():
                    fail()
            fail()
        assert torch.equal(latents(sampler), plain_latents())
    with (
        pytest.raises(RuntimeError, match="a fault"),
        sampler_of(model) as sampler,
        sampler.applying([(patch_of(), 1.0)]),
    ):
        fail()
    assert same_tensors(weights_of(model.unet), before)
    assert traces(model.unet) == []
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_bare_ends_with_an_error_and_the_patch_is_on_again():
    with sampler_of(TinyModel()) as sampler, sampler.applying([(patch_of(), 1.0)]):
        applied = latents(sampler)
        with pytest.raises(RuntimeError), sampler.unpatched():
            raise RuntimeError
        assert torch.equal(latents(sampler), applied)


def test_the_model_comes_back_bit_by_bit():
    model = TinyModel()
    before = weights_of(model.unet)
    with sampler_of(model) as sampler, sampler.applying([(patch_of(), 1.0)]):
        latents(sampler)
        assert same_tensors(weights_of(model.unet), before)
    assert same_tensors(weights_of(model.unet), before)


def test_a_foreign_patch_is_refused_and_nothing_is_applied():
    with sampler_of(TinyModel()) as sampler:
        with pytest.raises(ForgetError), sampler.applying([(patch_of(), 1.0), (make_patch(), 1.0)]):
            pass
        assert torch.equal(latents(sampler), plain_latents())


def test_pictures_come_in_batches_and_are_counted():
    counts = []
    with sampler_of(TinyModel(), batch=2, on_pictures=counts.append) as sampler:
        pictures = sampler.draw(["a dog"] * 5, range(5))
        alone = sampler.draw(["a dog"], [4])
    assert pictures.shape == (5, 64, 64, 3) and counts == [2, 2, 1, 1]
    assert pictures.min() >= 0 and pictures.max() <= 1
    # A picture depends on its seed alone, not on its neighbours.
    torch.testing.assert_close(pictures[4:], alone, rtol=0, atol=1e-5)


def test_on_pictures_may_end_it():
    def stop(count):
        raise KeyboardInterrupt

    model = TinyModel()
    with pytest.raises(KeyboardInterrupt), sampler_of(model, 1, stop) as sampler:
        sampler.draw(PROMPTS, SEEDS)
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_noise_belongs_to_its_seed():
    with sampler_of(TinyModel()) as sampler:
        noise = sampler.noise([5, 6])
        assert noise.shape == (2, 4, 8, 8)
        assert torch.equal(noise[1:], sampler.noise([6])) and not torch.equal(noise[0], noise[1])


def test_a_prompt_is_encoded_once(monkeypatch):
    model, encoded = TinyModel(), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda prompt: encoded.append(prompt) or encode(prompt))
    with sampler_of(model) as sampler:
        sampler.draw(["a dog", "a dog"], [1, 2])
        sampler.draw(["a dog"], [3])
    assert sorted(prompt.text for prompt in encoded) == ["", "a dog"]


def test_size_zero_is_the_familys():
    with sampler_of(TinyModel()) as sampler:
        assert sampler.sampling == Sampling(3, 2.0, 64)
