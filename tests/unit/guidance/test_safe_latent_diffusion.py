"""Safe Latent Diffusion against its equations, written out."""

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.guidance.safe_latent_diffusion import (
    PRESETS,
    SAFETY_TEXT,
    SafeGuidance,
    SafeSettings,
    concept_prompt,
    safe_scale,
    step_of,
)

STEPS = 6


def predictions(seed, batch=2):
    """eps_p, eps_S, eps_0 of one step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, 4, 3, 5, generator=generator, dtype=torch.float64) * 0.01


def written_out(settings, steps, guidance=7.5):
    """The paper's equations element by element: the guided noise of each step."""
    delta, s_S, lam, s_m, beta = (
        settings.warmup, settings.scale, settings.threshold, settings.momentum_scale,
        settings.momentum_beta,
    )  # fmt: skip
    nu = [0.0] * steps[0][0].numel()  # eps_p, eps_S and eps_0 have a step's three places
    results = []
    for t, step in enumerate(steps):
        guided = []
        for i, (p, s, e) in enumerate(zip(*(part.flatten().tolist() for part in step))):
            phi = min(1.0, abs(s_S * (p - s)))
            mu = phi if p - s < lam else 0.0
            gamma = mu * (s - e) + s_m * nu[i]
            nu[i] = beta * nu[i] + (1 - beta) * gamma
            guided.append(e + guidance * ((p - e) - (gamma if t >= delta else 0.0)))
        results.append(torch.tensor(guided, dtype=torch.float64).view_as(step[0]))
    return results


@pytest.mark.parametrize(
    "settings",
    [
        SafeSettings(2, 150, 0.004, 0.3, 0.4),
        SafeSettings(0, 5000, 1.0, 0.5, 0.7),
        SafeSettings(3, 200, 0.0, 0.0, 0.0),
        SafeSettings(0, 60, -0.002, 1.0, 0.999),
    ],
)
def test_guided_noise_follows_the_equations(settings):
    steps = [predictions(seed) for seed in range(STEPS)]
    run = SafeGuidance(settings)
    for t, (ours, expected) in enumerate(zip(steps, written_out(settings, steps))):
        text, concept, empty = ours
        safe = text - run(t, text, concept, empty)
        guided = empty + 7.5 * (safe - empty)
        torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-14)
        plain = empty + 7.5 * (text - empty)
        assert torch.equal(guided, plain) == (t < settings.warmup)


def test_scale_is_cut_at_one_and_strict_at_the_threshold():
    text = torch.tensor([0.5, 0.25, -0.25, -8.0])
    found = safe_scale(text, torch.zeros(4), scale=2.0, threshold=0.5)
    assert found.tolist() == [0.0, 0.5, 0.5, 1.0]


def test_presets_are_the_papers():
    numbers = {
        name: (p.warmup, p.scale, p.threshold, p.momentum_scale, p.momentum_beta)
        for name, p in PRESETS.items()
    }
    assert numbers == {
        "weak": (15, 200, 0.0, 0.0, 0.0),
        "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7),
        "max": (0, 5000, 1.0, 0.5, 0.7),
    }
    assert len(SAFETY_TEXT.split(", ")) == 20


def test_scale_zero_never_steers():
    run = SafeGuidance(SafeSettings(0, 0, 1.0, 0.5, 0.7))
    assert all(not run(t, *predictions(t)).any() for t in range(STEPS))


def test_warmup_builds_momentum():
    """The first steered step already has what the warm-up gathered."""
    warm = SafeGuidance(SafeSettings(3, 300, 0.01, 0.5, 0.7))
    cold = SafeGuidance(SafeSettings(3, 300, 0.01, 0.5, 0.7))
    for t in range(3):
        assert not warm(t, *predictions(t)).any()
    assert not torch.equal(warm(3, *predictions(3)), cold(3, *predictions(3)))


def test_further_predictions_of_a_step_leave_the_momentum_alone():
    settings = SafeSettings(0, 300, 0.01, 0.5, 0.7)
    once, often = SafeGuidance(settings), SafeGuidance(settings)
    for t in range(STEPS):
        gamma = once(t, *predictions(t))
        assert torch.equal(often(t, *predictions(t)), gamma)
        other = often(t, *predictions(100 + t))
        assert not torch.equal(other, gamma)
        assert torch.equal(often(t, *predictions(t)), gamma)


def test_only_a_warmup_without_momentum_is_idle():
    assert SafeGuidance(PRESETS["weak"]).idle(14)
    assert not SafeGuidance(PRESETS["weak"]).idle(15)
    assert not SafeGuidance(PRESETS["medium"]).idle(0)


def test_step_of_a_noise_level():
    sigmas = [14.6, 5.0, 2.0, 0.5, 0.0]
    assert [step_of(sigma, sigmas) for sigma in sigmas[:-1]] == [0, 1, 2, 3]
    assert step_of(5.0001, sigmas) == 1  # rounding
    assert step_of(3.0, sigmas) == 1  # a second-order sampler's midpoint
    assert step_of(20.0, sigmas) == 0  # churn lifts the level above the schedule
    assert step_of(0.01, sigmas) == 3


@pytest.mark.parametrize(
    "numbers", [(-1, 1, 0, 0, 0), (0, -1, 0, 0, 0), (0, 1, float("nan"), 0, 0), (0, 1, 0, 2, 0),
                (0, 1, 0, 0, 1)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ForgetError, match="is .*: use "):
        SafeSettings(*numbers)


def test_concepts_stand_in_place_of_the_text():
    concepts = [Concept("dog", aliases=("puppy",)), Concept("ink (drawing)", "style")]
    prompt = concept_prompt(concepts, "ignored")
    assert prompt.text == "dog, puppy, ink (drawing)" and prompt.plain
    prompt = concept_prompt(None, "a (cat:1.2)")
    assert prompt.text == "a (cat:1.2)" and not prompt.plain
    with pytest.raises(ForgetError, match="nothing to leave out"):
        concept_prompt([], " ")
