"""How much of a concept remains, against its equation, and going no further than needed."""

import copy
from dataclasses import replace

import pytest
import torch

from fmn.concepts.concept import Prompt
from fmn.concepts.prompt_templates import sentences
from fmn.linalg import full_change
from fmn.methods.reread import method, regression
from fmn.methods.reread.regression_data import QuerySampler
from fmn.methods.reread.residual import FIRST, STEPS, Residual
from fmn.models.sampling import trailing_timesteps

from ..tiny import TinyModel, same_tensors
from .test_reread_run import DOG, FEW, OIL, OUTPUTS

PAIRS = sentences(DOG, 2)


@pytest.fixture
def model():
    return TinyModel()


def random_change(model):
    generator, changes = torch.Generator().manual_seed(3), {}
    for name in OUTPUTS:
        out, width = model.unet.get_submodule(name).weight.shape
        up, down = (torch.randn(shape, generator=generator) for shape in ((out, 2), (2, width)))
        changes[name] = up * 0.3, down
    return changes


def remaining(model, denoiser, pairs=PAIRS):
    sampler = QuerySampler(model, denoiser, FEW, lambda step: None, [])
    return Residual(sampler, pairs)


def test_all_remains_without_a_change(model):
    with model.borrow_denoiser() as denoiser:
        share = remaining(model, denoiser)
        assert share({}) == pytest.approx(1.0, abs=1e-6)
        share(random_change(model))
        assert share({}) == pytest.approx(1.0, abs=1e-6)  # and none stays on the model


def test_the_share_is_that_of_the_equation(model):
    """(e'(c) - e(o)) . (e(c) - e(o)) / |e(c) - e(o)|^2 at the first points of guided drawings."""
    changes, patched = random_change(model), copy.deepcopy(model)
    with torch.no_grad():
        for name, factors in changes.items():
            patched.unet.get_submodule(name).weight += full_change(*factors)
    count = len(PAIRS)
    text, other, empty = (
        torch.cat([model.encode(Prompt(each, each)).context for each in texts])
        for texts in (*zip(*PAIRS), [""] * count)
    )
    alphas, times = model_alphas(model), trailing_timesteps(1000, STEPS)
    x = torch.stack(
        [
            torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
            for seed in range(count)
        ]
    )
    shares = []
    with torch.no_grad():
        for i in range(FIRST):
            t = torch.full((count,), times[i])

            def noise(unet, context, x=x, t=t):
                return unet(x, t, context).sample

            frozen, without = noise(model.unet, text), noise(model.unet, other)
            effect, now = frozen - without, noise(patched.unet, text) - without
            shares.append(float((now * effect).sum() / effect.square().sum()))
            base = noise(model.unet, empty)
            guided = base + FEW.guidance * (frozen - base)
            alpha, after = alphas[times[i]], alphas[times[i + 1]]
            clean = (x - (1 - alpha).sqrt() * guided) / alpha.sqrt()
            x = after.sqrt() * clean + (1 - after).sqrt() * guided
    with model.borrow_denoiser() as denoiser:
        found = remaining(model, denoiser)(changes)
    assert found == pytest.approx(sum(shares) / FIRST, rel=1e-3)


def model_alphas(model):
    with model.borrow_denoiser() as denoiser:
        return denoiser.alphas_cumprod


class Told:
    """In place of ``Residual``: a share for each overshoot that has been reached."""

    shares = {}

    def __init__(self, draw, pairs):
        self.own, self.asked = self.shares[pairs[0][0]], 0

    def __call__(self, changes):
        self.asked += 1
        return self.own[min(self.asked, len(self.own)) - 1]


@pytest.mark.parametrize(
    "first, second, overshoots",
    [
        ([0.05], [0.05], [0.0, 0.0]),
        ([0.3, 0.05], [0.1], [0.2, 0.0]),
        ([0.9, 0.7, 0.5, 0.3], [0.4, 0.25, 0.1], [0.5, 0.4]),  # the first stops at its limit
        ([0.5, 0.35, 0.3], [0.2, 0.15], [0.4, 0.2]),  # a step that takes less than 0.1 is the last
    ],
)
def test_each_concept_goes_as_far_as_it_needs(model, monkeypatch, first, second, overshoots):
    spoken = [sentences(DOG, 2), sentences(OIL, 2)]
    Told.shares = {spoken[0][0][0]: first, spoken[1][0][0]: second}
    monkeypatch.setattr(regression, "Residual", Told)
    settings = replace(FEW, overshoot=0.5, overshoot_style=0.6, stop_at=0.1)
    seen = []
    monkeypatch.setattr(
        regression, "smallest_overshoots",
        lambda *args, plain=regression.smallest_overshoots: seen.append(plain(*args)) or seen[-1],
    )  # fmt: skip
    patch = method.run(model, [DOG, OIL], settings)
    assert seen[0] == pytest.approx(overshoots)
    assert set(patch.changes) == set(OUTPUTS)


def test_a_share_of_all_goes_nowhere_beyond(model):
    """With stop_at 1 the patch is that of overshoot 0, bit for bit."""
    far = method.run(model, [DOG], replace(FEW, stop_at=1.0))
    plain = method.run(model, [DOG], replace(FEW, overshoot=0.0))
    for side in (0, 1):
        assert same_tensors(
            {name: pair[side] for name, pair in far.changes.items()},
            {name: pair[side] for name, pair in plain.changes.items()},
        )
