"""DDIM against hand computation, and the ways to step in."""

import pytest
import torch

from fmn.errors import ForgetError
from fmn.models.interface import Text
from fmn.models.sampling import (
    DDPMSchedule,
    Sampling,
    SigmaSchedule,
    ddim,
    ddpm_sigma,
    expand,
    guided,
    posterior_sigma,
    trailing_timesteps,
)

ALPHAS = torch.tensor([0.9, 0.8, 0.64, 0.36])
X = torch.full((1, 4, 1, 1), 2.0)


def constant(value):
    return lambda x, t: torch.full_like(x, value)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fresh(seed=0):
    generator = seeded(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def test_time_steps_are_evenly_spaced_from_the_last():
    assert trailing_timesteps(1000, 4) == [999, 749, 499, 249]
    assert trailing_timesteps(1000, 1) == [999]
    assert trailing_timesteps(4, 4) == [3, 2, 1, 0]
    assert trailing_timesteps(1000, 3) == [999, 666, 332]


def test_two_steps_by_hand():
    """0.36 -> 0.8 -> 1 with noise 0.5: x_0 by eq. 12 of the paper, sigma 0."""
    clean = (2 - 0.8 * 0.5) / 0.6
    x = 0.8**0.5 * clean + 0.2**0.5 * 0.5
    expected = (x - 0.2**0.5 * 0.5) / 0.8**0.5
    torch.testing.assert_close(ddim(constant(0.5), X, ALPHAS, 2), torch.full_like(X, expected))


def test_one_step_gives_the_predicted_clean_latent():
    result = ddim(constant(0.5), X, ALPHAS, 1)
    torch.testing.assert_close(result, torch.full_like(X, (2 - 0.8 * 0.5) / 0.6))


def test_the_model_sees_the_time_steps_in_order():
    seen = []

    def predict(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    ddim(predict, X, ALPHAS, 4)
    assert seen == [3, 2, 1, 0]


def test_fresh_noise_by_hand():
    """eta 1 is DDPM's: sigma^2 = (1 - a') / (1 - a) * (1 - a / a')."""
    drawn = torch.randn(X.shape, generator=seeded())
    sigma = (0.2 / 0.64 * (1 - 0.36 / 0.8)) ** 0.5
    clean = (2 - 0.8 * 0.5) / 0.6
    expected = 0.8**0.5 * clean + (0.2 - sigma**2) ** 0.5 * 0.5 + 3 * sigma * drawn
    result = ddim(constant(0.5), X, ALPHAS, 2, last=1, eta=1.0, spread=3.0, fresh=fresh())
    torch.testing.assert_close(result, expected)


def test_eta_above_one_takes_the_absolute_value_under_the_root():
    eta = 3.0
    sigma = eta * (0.2 / 0.64 * (1 - 0.36 / 0.8)) ** 0.5
    assert sigma**2 > 0.2
    clean = (2 - 0.8 * 0.5) / 0.6
    expected = 0.8**0.5 * clean + (sigma**2 - 0.2) ** 0.5 * 0.5
    result = ddim(constant(0.5), X, ALPHAS, 2, last=1, eta=eta, spread=0.0)
    torch.testing.assert_close(result, torch.full_like(X, expected))


def noisy(x, t):
    return x * 0.3 + t / 10


def test_without_eta_it_draws_no_random_numbers():
    before = torch.get_rng_state()
    ddim(noisy, X, ALPHAS, 4)
    FLOW.sample(noisy, X, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_eta_the_generator_decides():
    first, again, other = (
        ddim(noisy, X, ALPHAS, 4, eta=1.0, fresh=fresh(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_two_goes_are_one(cut):
    whole = ddim(noisy, X, ALPHAS, 4)
    half = ddim(noisy, X, ALPHAS, 4, last=cut)
    assert torch.equal(ddim(noisy, half, ALPHAS, 4, first=cut), whole)


LEVELS = torch.tensor([0.25, 0.5, 0.75, 1.0])
VARIANCE_EXPLODING = SigmaSchedule(LEVELS, (1 + LEVELS**2).sqrt(), torch.ones(4))
FLOW = SigmaSchedule(LEVELS, torch.ones(4), 1 - LEVELS)


def test_euler_by_hand():
    """From noise 2 by a velocity of 0.5 x: at sigma 1, then at 0.5."""
    found = FLOW.sample(lambda x, t: x / 2, X, 2)
    torch.testing.assert_close(found, torch.full_like(X, 2 * 0.75 * 0.75))


def test_two_goes_of_euler_are_one():
    half = FLOW.partial_sample(lambda x, t: x / 2, X, 4, 3)
    torch.testing.assert_close(half, FLOW.sample(lambda x, t: x / 2, X, 4, last=3))
    whole = FLOW.sample(lambda x, t: x / 2, X, 4)
    torch.testing.assert_close(FLOW.sample(lambda x, t: x / 2, half, 4, first=3), whole)


def test_fresh_noise_of_a_flow_by_hand():
    """The step from sigma 0.75 to 0.5; from sigma 1 all of the noise would be fresh."""
    clean, noise = 2 - 0.75 * 1, 2 + 0.25 * 1  # velocity 1
    sigma = 1.2 * 0.5 * (1 - (0.25 * 0.5 / (0.5 * 0.75)) ** 2) ** 0.5
    expected = 0.5 * clean + abs(0.5**2 - sigma**2) ** 0.5 * noise
    expected = expected + 1.1 * sigma * torch.randn(X.shape, generator=seeded())
    options = {"first": 1, "last": 2, "eta": 1.2, "spread": 1.1, "fresh": fresh()}
    found = FLOW.sample(constant(1.0), X, 4, **options)
    torch.testing.assert_close(found, expected)


def test_posterior_noise_is_ddpms():
    """A flow's x is DDPM's x_t over a factor, so q(x' | x, x_0) is the same."""
    signals, levels = (0.25, 0.5), (0.75, 0.5)
    over = [(a**2 + s**2) ** 0.5 for a, s in zip(signals, levels)]
    alphas = [torch.tensor((a / o) ** 2) for a, o in zip(signals, over)]
    expected = float(ddpm_sigma(*alphas)) * over[1]
    assert posterior_sigma(signals, levels) == pytest.approx(expected)


def test_a_flow_of_known_end_stays_on_its_way():
    """With fresh noise, too, a network that knows the picture ends at it."""
    clean = torch.full_like(X, 0.7)
    found = FLOW.sample(lambda x, t: (x - clean) / LEVELS[t], X, 4, eta=1.0, fresh=fresh())
    torch.testing.assert_close(found, clean)


def test_correct_sees_every_prediction_and_replaces_it():
    seen = []

    def correct(x, noise, t, alpha):
        seen.append((float(noise.mean()), t, round(float(alpha), 6)))
        return torch.full_like(noise, 0.5)

    result = ddim(constant(7.0), X, ALPHAS, 2, correct=correct)
    assert seen == [(7.0, 3, 0.36), (7.0, 1, 0.8)]
    assert torch.equal(result, ddim(constant(0.5), X, ALPHAS, 2))


def test_after_replaces_what_a_step_gave():
    seen = []

    def after(x, alpha):
        seen.append(round(float(alpha), 6))
        return torch.ones_like(x)

    assert torch.equal(ddim(noisy, X, ALPHAS, 2, after=after), torch.ones_like(X))
    assert seen == [0.8, 1.0]


class Recorder:
    """A model whose noise is the mean of the text."""

    def __init__(self):
        self.calls = []

    def predict_noise(self, x, t, text):
        self.calls.append((len(x), t.tolist()))
        return text.context.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x)


def text_of(*values):
    return Text(torch.tensor(values).view(-1, 1, 1).expand(-1, 77, 3))


def test_guidance_by_hand():
    denoiser = Recorder()
    predict = guided(denoiser, text_of(3.0, 5.0), text_of(1.0), 4.0)
    noise = predict(torch.zeros(2, 4, 1, 1), 7)
    assert noise[:, 0, 0, 0].tolist() == [1 + 4 * 2, 1 + 4 * 4]
    assert denoiser.calls == [(4, [7, 7, 7, 7])]


def test_guidance_of_one_asks_once():
    denoiser = Recorder()
    noise = guided(denoiser, text_of(3.0, 5.0), None, 1)(torch.zeros(2, 4, 1, 1), 7)
    assert noise[:, 0, 0, 0].tolist() == [3, 5]
    assert denoiser.calls == [(2, [7, 7])]


def test_one_text_as_a_batch():
    batch = expand(Text(torch.ones(1, 77, 3), {"pooled": torch.ones(1, 5)}), 4)
    assert batch.context.shape == (4, 77, 3) and batch.vectors["pooled"].shape == (4, 5)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(steps=0), "steps are 0"),
        (dict(steps=1001), "steps are 1001"),
        (dict(guidance=-1.0), "Guidance is -1"),
        (dict(guidance=101.0), "Guidance is 101"),
        (dict(size=100), "size is 100"),
        (dict(size=-64), "size is -64"),
        (dict(size=8192), "size is 8192"),
    ],
)
def test_bad_sampling_is_refused(values, message):
    with pytest.raises(ForgetError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("schedule", "x_t", "target"),
    [
        (DDPMSchedule(ALPHAS), 0.8 * 2 + 0.6 * 3, 3.0),
        (FLOW, 0.25 * 2 + 0.75 * 3, 3.0 - 2.0),  # the velocity, noise - picture
        (VARIANCE_EXPLODING, (2 + 0.75 * 3) / (1 + 0.75**2) ** 0.5, 3.0),
    ],
)
def test_noised_by_hand(schedule, x_t, target):
    clean, noise = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), 3.0)
    found = schedule.noised(clean, noise, torch.tensor([2, 2]))
    for values, expected in zip(found, (x_t, target)):
        torch.testing.assert_close(values, torch.full_like(values, expected))
