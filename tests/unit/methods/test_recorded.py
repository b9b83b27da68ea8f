"""Re-read for transformers: at which noise it records."""

from types import SimpleNamespace

import pytest
import torch

from fmn.methods.reread.recorded import Batch, RowSampler
from fmn.models.sampling import SigmaSchedule

SIGMAS = torch.linspace(0.01, 1, 100)


class Watched:
    """Its velocity is the text, a number, times x."""

    schedule = SigmaSchedule(SIGMAS, torch.ones(100), 1 - SIGMAS)

    def __init__(self):
        self.seen = []

    def predict_each(self, x_t, t, texts):
        self.seen.append((t, len(texts)))
        return torch.tensor(texts).view(-1, 1, 1, 1) * x_t


@pytest.fixture
def sampler():
    made = RowSampler.__new__(RowSampler)
    made.watched, made.prompts, made.progress = Watched(), SimpleNamespace(at_once=2), id
    return made


def test_levels_are_those_of_eulers_steps(sampler):
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch([1.0, 2.0, 3.0], noise, torch.zeros(3, 1))
    first, second, third = sampler.along_drawing(batch, 3)
    assert [each.t for each in (first, second, third)] == [99, 66, 32]
    assert torch.equal(first.x_t, noise) and first.texts == third.texts == batch.texts
    factors, x = torch.tensor(batch.texts).view(-1, 1, 1, 1), noise
    for found, (before, after) in ((second, (99, 66)), (third, (66, 32))):
        x = x + (SIGMAS[after] - SIGMAS[before]) * factors * x
        torch.testing.assert_close(found.x_t, x)
    assert sampler.watched.seen == [(99, 2), (99, 1), (66, 2), (66, 1)]


def test_one_level_is_pure_noise_and_runs_nothing(sampler):
    batch = Batch([1.0], torch.ones(1, 1, 2, 2), torch.zeros(1, 1))
    (only,) = sampler.along_drawing(batch, 1)
    assert only.t == 99 and torch.equal(only.x_t, batch.x_t) and sampler.watched.seen == []
