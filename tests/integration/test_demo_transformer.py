"""The demo transformer in diffusers' classes: its layers, its texts, and what it refuses."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.prompt_templates import PLACEHOLDER
from fmn.errors import ForgetError
from fmn.hosts.diffusers import transformer
from fmn.hosts.diffusers.open import open_model
from fmn.methods import forget
from fmn.methods.esd import Settings as ESDSettings
from fmn.methods.reread.settings import Settings
from fmn.metrics.outcome import outcomes
from fmn.models.families import layers
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling, seeded_noise
from fmn.training import textual_inversion as inversion


@pytest.fixture(scope="module")
def model():
    return open_model("demo-dit", "cpu")


@pytest.fixture(scope="module")
def patch(model):
    settings = Settings(transformer_prompts=1, keep_prompts=4, query_positions=4, passes=1)
    return forget(model, [Concept("dog", "object")], settings)


def test_a_patch_does_the_same_as_adapters_and_in_the_weights(model, patch):
    assert len(patch.changes) == 7 and model.family.resolution == 128
    noise = model.initial_noise([0], 64)
    with open_sampler(model, Sampling(2, 3.0, 64)) as sampler:
        text = sampler.text("a dog")
        plain = sampler.latents(text, noise)
        with sampler.applying([(patch, 1.0)]):
            applied = sampler.latents(text, noise)
    added = open_model("demo-dit", "cpu").add_patches([(patch, 1.0)])
    assert (applied - plain).abs().max() > 0.05
    found = added.sample_latents(["a dog"], noise, 2, 3.0)
    torch.testing.assert_close(found, applied, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.sample_latents(["a dog"], noise, 2, 3.0), plain)


def test_what_is_left_is_read_off_at_pure_noise(model, patch):
    """(v'(c) - v(o)) . (v(c) - v(o)) / |v(c) - v(o)|^2, with v' of weights that hold the patch."""

    def velocity(host, text):
        with host.watch(1, 16) as watched:
            return watched.predict_each(seeded_noise([0], 16), -1, [host.encode(Prompt(text, ""))])

    before, without = velocity(model, "a photo of dog"), velocity(model, "a photo of")
    after = velocity(open_model("demo-dit", "cpu").add_patches([(patch, 1.0)]), "a photo of dog")
    effect = before - without
    (found,) = outcomes(model, patch, [Concept("dog", "object")])
    share = float(((after - without) * effect).sum() / effect.square().sum())
    assert found.left == pytest.approx(share, abs=1e-3) and abs(share - 1) > 0.2
    assert str(found) == f"dog: {100 * max(share, 0):.0f} % of its effect is left."
    torch.testing.assert_close(velocity(model, "a photo of dog"), before, rtol=0, atol=0)


def test_learned_words_are_read_as_a_prompts_own(model):
    wanted = model.encode(Prompt("a photo of dog", ""))
    with model.borrow_text_encoder() as encoder:
        text, _ = encoder.encode(f"a photo of {PLACEHOLDER}", encoder.vectors("dog"))
    torch.testing.assert_close(text.context, wanted.context)
    torch.testing.assert_close(text.vectors["pooled_output"], wanted.vectors["pooled_output"])


def test_words_are_learned_by_velocities(model):
    images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    settings = inversion.Settings(steps=1, batch=2, tokens=1, start="dog")
    with model.borrow_denoiser() as denoiser:
        found = inversion.invert(model, denoiser, images, settings)
        generator = torch.Generator().manual_seed(0)
        torch.randint(1, (1,), generator=generator)
        latents = model.encode_images(images, 128)
        rows, t, noise = inversion.draw_noise(latents, 2, 1000, generator)
        sigma, clean = (t.view(-1, 1, 1, 1) + 1) / 1000, latents[rows]
        text = model.encode_texts(["a photo of dog"] * 2)
        with torch.no_grad():
            predicted = denoiser.predict_noise((1 - sigma) * clean + sigma * noise, t, text)
    expected = (predicted - (noise - clean)).square().mean()
    assert found.losses == [pytest.approx(float(expected), rel=1e-3)]
    assert not torch.equal(found.vectors, found.start)


@pytest.mark.parametrize("rank, found", [(0, 8), (3, 3)])
def test_a_rank_of_0_is_all(model, rank, found):
    settings = Settings(
        transformer_prompts=1, keep_prompts=4, query_positions=4, passes=1, rank=rank
    )
    patch = forget(model, [Concept("dog", "object")], settings)
    assert max(up.shape[1] for up, _ in patch.changes.values()) == found


def test_more_noise_levels_and_near_words_are_counted_and_tell(model, patch):
    settings = Settings(
        transformer_prompts=1, keep_prompts=4, query_positions=4, passes=1,
        transformer_near_words=2, transformer_levels=2,
    )  # fmt: skip
    steps = []
    found = forget(model, [Concept("dog", "object")], settings, steps.append)
    assert [step.index for step in steps] == list(range(1, steps[-1].total + 1))
    assert found.changes.keys() == patch.changes.keys()
    assert all(not torch.equal(found.change_of(n), patch.change_of(n)) for n in patch.changes)


def test_joined_projections_predict_the_same(model):
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(**transformer.CONFIG).eval()
    inputs = torch.randn(1, 4, 4, 4), torch.tensor([0.7]), *torch.randn(2, 128).split(1)
    inputs = *inputs[:2], inputs[2][None].expand(1, 24, 128), inputs[3]
    with torch.no_grad():
        before = transformer.velocity(flux, *inputs)
        joined = transformer.DiffusersTransformer(flux, model.pipeline)
        torch.testing.assert_close(transformer.velocity(joined.flux, *inputs), before)
        joined._module("lora_unet_double_blocks_0_txt_attn_qkv").weight.mul_(2)
        assert (transformer.velocity(joined.flux, *inputs) - before).abs().max() > 1e-4
    assert len(layers(joined.family)) == 1 + 2 + 2 * 10 + 4 * 2


def test_esd_trains_the_texts_side(model):
    patch = forget(
        model, [Concept("dog", "object")], ESDSettings(steps=2, sampling_steps=2, size=64)
    )
    assert sorted(name.partition("txt_")[2] for name in patch.changes) == [
        "attn_proj", "attn_proj", "attn_qkv", "attn_qkv",
    ]  # fmt: skip
    assert len(patch.info["loss"]) and not any(
        parameter.requires_grad for parameter in model.flux.parameters()
    )


def test_texts_are_one_batch_of_first_tokens(model):
    text = model.encode_texts(["a dog", "a photo of a dog on the beach"])
    assert text.context.shape == (2, 24, 128) and text.vectors["pooled_output"].shape == (2, 128)
    whole = model.pipeline.text_encoder(
        model.pipeline.tokenizer("a dog", return_tensors="pt").input_ids
    )[0][0]
    torch.testing.assert_close(text.context[0, : len(whole)], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text.vectors["pooled_output"][0], whole[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("dog " * 30, ""), "32 tokens.*24.*shorten"),
        (Prompt("a (dog:1.2)", "", plain=False), "weights.*leave"),
    ],
)
def test_prompts_that_it_cannot_read(model, prompt, words):
    with pytest.raises(ForgetError, match=words):
        model.encode(prompt)


def test_a_patch_of_another_layer_is_refused(model, patch):
    patch = type(patch)(patch.family, {"lora_unet_other": (torch.ones(2, 1), torch.ones(1, 2))}, {})
    with pytest.raises(ForgetError, match="lora_unet_other.*does not have"):
        model.add_patches([(patch, 1.0)])


def test_what_is_no_choice_or_missing_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ForgetError, match="demo-dit has a VAE.*leave out"):
        open_model("demo-dit", vae="demo")
    monkeypatch.setattr(transformer, "DEMO_TRANSFORMER", tmp_path / "dit.safetensors")
    with pytest.raises(ForgetError, match="missing at .*dit.safetensors.*install"):
        open_model("demo-dit")
