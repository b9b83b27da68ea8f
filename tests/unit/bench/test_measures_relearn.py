"""Relearning: what is taught, what comes back, and that nothing stays behind."""

from functools import partial

import pytest
import torch

from fmn.bench.measures import relearn as module
from fmn.bench.measures.relearn import (
    RelearnSettings,
    fine_tune,
    lesson_asks,
    make_adapters,
    relearn,
)
from fmn.bench.suite import Target
from fmn.errors import ForgetError, NonFiniteLoss
from fmn.models.adapters import attached
from fmn.models.families import FAMILIES, layers
from fmn.patches.patch import ForgetPatch

from ..tiny import TINY, random_changes, same_tensors, weights_of
from ..worlds import GreyJudge, Sees, make_trial

trial_of = partial(make_trial, count=2)
QUICK = RelearnSettings(pictures=3, steps=3, batch=2)
PICTURES = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 64, 64, 3)


@pytest.fixture
def worn(sampler, monkeypatch):
    monkeypatch.setitem(FAMILIES, "tiny", TINY)
    patch = ForgetPatch(TINY, random_changes(TINY, 2, size=1.0), {})
    with sampler.applying([(patch, 1.0)]):
        yield sampler


def hooks(unet):
    return sum(len(module._forward_hooks) for module in unet.modules())


def test_adapters_are_on_all_attention_and_start_at_nothing(sampler):
    adapters = make_adapters(sampler, 2, 0)
    names = {layer.name for layer in layers(TINY)}
    assert set(adapters) == {name for name in names if ".attn1.to_" in name or ".attn2.to_" in name}
    assert any(".attn1.to_q" in name for name in adapters)
    before = sampler.draw(["a dog"], [1])
    with attached(adapters, sampler.denoiser.module):
        assert torch.equal(sampler.draw(["a dog"], [1]), before)


def test_fine_tuning_lowers_the_loss(sampler):
    def teach(lr):
        settings = RelearnSettings(steps=25, batch=4, lr=lr, rank=4)
        adapters = make_adapters(sampler, settings.rank, 0)
        with attached(adapters, sampler.denoiser.module):
            return fine_tune(sampler, adapters, ["a dog"] * 4, PICTURES, settings, 0)

    # The same noise and time steps, with and without learning.
    taught, idle = teach(0.05), teach(1e-9)
    assert len(taught) == 25 and taught[0] == idle[0]
    assert sum(taught[-10:]) < 0.97 * sum(idle[-10:])


def test_each_picture_keeps_its_prompt(sampler, monkeypatch):
    asked = []
    texts = sampler.texts
    monkeypatch.setattr(sampler, "texts", lambda prompts: asked.append(prompts) or texts(prompts))
    adapters = make_adapters(sampler, 1, 0)
    sampler.model.seen.clear()
    prompts = [f"prompt {i}" for i in range(4)]
    with attached(adapters, sampler.denoiser.module):
        fine_tune(sampler, adapters, prompts, PICTURES, RelearnSettings(steps=5, batch=3), 0)
    alphas = sampler.denoiser.alphas_cumprod
    assert len(asked) == 5
    for given, (x_t, t, _) in zip(asked, sampler.model.seen):
        for prompt, x, step in zip(given, x_t, t):
            # The tiny encoder gives the mean of the picture everywhere, and noise has mean 0.
            level = float(x.mean() / alphas[step].sqrt())
            noise = float(((1 - alphas[step]) / alphas[step]).sqrt()) / 16
            assert abs(level - int(prompt[-1]) / 3) < 5 * noise


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_patches_come_back_as_they_were(worn, monkeypatch, fails):
    trial = trial_of(worn, controls={"cat": PICTURES})
    unet, before = worn.model.unet, weights_of(worn.model.unet)
    picture, count = worn.draw(["a dog"], [1]), hooks(worn.model.unet)
    assert count > 0
    if fails:
        worn.model.poisoned = True
        monkeypatch.setattr(module, "recognised_examples", lambda trial, asks: (asks, PICTURES[:3]))
        with pytest.raises(NonFiniteLoss):
            relearn(trial, QUICK)
        worn.model.poisoned = False
    else:
        relearn(trial, QUICK)
    assert hooks(unet) == count
    assert same_tensors(weights_of(unet), before)
    assert torch.equal(worn.draw(["a dog"], [1]), picture)


def test_it_can_be_cancelled(worn):
    count, told = hooks(worn.model.unet), []

    def stop(pictures):
        told.append(pictures)
        if pictures == 0:
            raise KeyboardInterrupt

    worn.on_pictures = stop
    with pytest.raises(KeyboardInterrupt):
        relearn(trial_of(worn), QUICK)
    assert told[-1] == 0 and hooks(worn.model.unet) == count


def test_rows_tell_before_and_after(worn, monkeypatch):
    shown = []

    class Recorder(GreyJudge):
        def probabilities(self, images, domain):
            if domain == "concept":
                shown.append(images)
            found = torch.full((len(images),), 1)  # a dog, everywhere
            found[0] = 0 if len(shown) == 2 else 1
            return torch.nn.functional.one_hot(found, len(self.labels[domain])).float()

    trial = trial_of(worn, judge=Recorder())
    plain = trial.draw(lesson_asks(trial, 2))
    result = relearn(trial, QUICK)
    # Judged are the lesson's pictures, then those before and after it, and the untouched ones.
    assert torch.equal(shown[1], plain) and not torch.equal(shown[2], plain)
    asks = lesson_asks(trial, 2)
    assert [row["prompt"] for row in result["rows"]] == ["a photo of a dog"] * 2
    assert [row["seed"] for row in result["rows"]] == [ask.seed for ask in asks]
    assert [row["before"] for row in result["rows"]] == [False, True]
    assert [row["still"] for row in result["rows"]] == [True, True]
    assert all(row["untouched"] for row in result["rows"])
    assert result["controls"] == "absent" and list(result["losses"]) == ["dog"]
    assert len(result["losses"]["dog"]) == 3 and result["pictures"] == 3


def test_lessons_are_other_pictures_than_those_asked_for(sampler, monkeypatch):
    taught = []
    given = module.fine_tune

    def watched(sampler, adapters, prompts, pictures, settings, seed):
        taught.append((prompts, pictures))
        return given(sampler, adapters, prompts, pictures, settings, seed)

    monkeypatch.setattr(module, "fine_tune", watched)
    trial = trial_of(sampler, controls={"cat": PICTURES})
    result = relearn(trial, QUICK)
    spare = lesson_asks(trial, 5)[2:]
    assert taught[0][0] == ["a photo of a dog"] * 3
    assert torch.equal(taught[0][1], trial.untouched(spare))
    assert not {ask.seed for ask in spare} & {row["seed"] for row in result["rows"]}
    assert taught[1][0] == ["a photo of a cat"] * 3
    assert torch.equal(taught[1][1], PICTURES[[0, 1, 2]])


def test_controls_are_judged_by_their_own_name(sampler):
    trial = trial_of(sampler, controls={"cat": PICTURES, "old man": PICTURES[:1]})
    result = relearn(trial, QUICK)
    rows = result["controls"]
    assert [row["concept"] for row in rows] == ["cat", "cat", "old man", "old man"]
    assert not any(row["still"] or row["before"] for row in rows)  # the judge sees only dogs
    assert all(row["still"] for row in result["rows"])
    assert list(result["losses"]) == ["dog", "cat", "old man"]
    cats = trial_of(sampler, controls={"cat": PICTURES}, judge=Sees("cat"), cache=trial.cache)
    with pytest.raises(ForgetError, match="in none of 3 pictures"):
        relearn(cats, QUICK)
    with pytest.raises(ForgetError, match="no label for the control 'boat'"):
        relearn(trial_of(sampler, controls={"boat": PICTURES}), QUICK)


def test_styles_and_unsafe_content_are_asked_for_as_everywhere(sampler):
    style = trial_of(sampler, "light")
    assert lesson_asks(style, 3) == style.target_asks(3)
    unsafe = trial_of(sampler, Target("gore", "unsafe", prompts={"pictures": ("a", "b")}))
    assert [ask.prompt for ask in lesson_asks(unsafe, 3)] == ["a", "b", "a"]
