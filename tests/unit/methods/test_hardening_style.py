"""What a style's adversarial training keeps: the pictures that look least like it."""

from dataclasses import replace

import torch

from fmn.concepts.concept import Concept
from fmn.methods.reread import method
from fmn.methods.reread.training_images import AT_ONCE, STYLE_STEPS, Scene, least_like
from fmn.models.interface import Text
from fmn.models.sampling import q_sample

from ..tiny import TinyModel

FEW = method.Settings(
    prompts=2, keep_prompts=4, images_per_concept=2, sampling_steps=2, guidance=2.0, size=64,
    robust_steps=2, robust_pictures=3,
)  # fmt: skip


def test_half_of_the_pictures_by_the_models_own_error():
    model = TinyModel()
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    plain, styled = (
        Text(model.encode_all([f"a {word}{end}" for word in "abcdef"])) for end in ("", ", oil")
    )
    told = []
    with model.borrow_denoiser() as denoiser:
        kept = least_like(denoiser, Scene(latents, plain), styled, FEW, lambda: told.append(1))
        generator, gain = torch.Generator().manual_seed(FEW.seed), [0.0] * 6
        for share in STYLE_STEPS:
            noise = torch.randn(latents.shape, generator=generator)
            for i in range(6):
                t = torch.tensor([int(share * 1000)])
                x_t = q_sample(latents[i : i + 1], noise[i : i + 1], denoiser.alphas_cumprod[t])
                for text, sign in ((plain, 1), (styled, -1)):
                    one = Text(text.context[i : i + 1])
                    with torch.no_grad():
                        found = denoiser.predict_noise(x_t, t, one)
                    gain[i] += sign * float((found - noise[i]).square().mean())
    least = sorted(sorted(range(6), key=gain.__getitem__)[:3])
    assert kept.index.tolist() == least
    assert torch.equal(kept.latents, latents[least])
    assert torch.equal(kept.text.context, plain.context[least])
    assert len(told) == len(STYLE_STEPS) * -(-6 // AT_ONCE)


def test_the_total_counts_the_style_steps():
    steps = []
    concepts = [Concept("oil painting", "style"), Concept("dog"), Concept("ink", "style")]
    patch = method.run(TinyModel(), concepts, FEW, steps.append)
    drawn = [step for step in steps if step.total != 3 * FEW.robust_steps]
    assert [step.index for step in drawn] == list(range(1, drawn[-1].total + 1))
    assert any(up.abs().sum() > 0 for up, _ in patch.changes.values())


def test_styles_are_pushed_by_their_own_setting():
    concept = Concept("oil painting", "style")
    settings = method.Settings(
        prompts=2, keep_prompts=4, images_per_concept=2, sampling_steps=2, size=64
    )
    first, second, third = (
        method.run(TinyModel(), [concept], replace(settings, **changes))
        for changes in (
            {},
            {"overshoot": 2.0},
            {"overshoot_style": 2 * settings.overshoot_style + 1},
        )
    )
    for name in first.changes:
        assert torch.equal(first.change_of(name), second.change_of(name))
        assert torch.allclose(2 * first.change_of(name), third.change_of(name), rtol=1e-4)
