"""What a patch leaves of a concept, against its equation, and how that is said."""

import copy
from dataclasses import replace

import pytest
import torch

from fmn.concepts.concept import Concept, Prompt
from fmn.linalg import full_change
from fmn.metrics.neighbours import Neighbours
from fmn.metrics.outcome import (
    FIRST,
    GUIDANCE,
    SMALLEST,
    STEPS,
    Outcome,
    in_words,
    outcomes,
)
from fmn.models.sampling import seeded_noise, trailing_timesteps

from ..tiny import TINY, TinyModel, make_patch, make_scheduler, traces

DOG, KEPT = Concept("dog"), ("cat", "wolf")
NEAR = [Neighbours("dog", dict.fromkeys(KEPT, 0.5), KEPT)]
PROMPTS = {name: f"a photo of {name}" for name in ("dog", *KEPT)}


def test_the_numbers_are_those_of_the_equations():
    """Share: (e'(c) - e(o)) . (e(c) - e(o)) / |e(c) - e(o)|^2, the mean over two points of a
    guided drawing; change: |e'(k) - e(k)| / |e'(c) - e(c)| at the first."""
    model, patch = TinyModel(), make_patch(TINY, size=0.05)
    patched = copy.deepcopy(model)
    with torch.no_grad():
        for name, factors in patch.changes.items():
            patched.unet.get_submodule(name).weight += full_change(*factors)

    def noise(host, prompt, x, t):
        with torch.no_grad():
            return host.unet(x, torch.tensor([t]), host.encode(Prompt(prompt, prompt)).context)[0]

    alphas, times = make_scheduler().alphas_cumprod, trailing_timesteps(1000, STEPS)
    x = start = seeded_noise([0], SMALLEST // 8)
    shares = []
    for now, following in zip(times[:FIRST], times[1:]):
        with_dog, without = noise(model, PROMPTS["dog"], x, now), noise(model, "a photo of", x, now)
        effect, left = with_dog - without, noise(patched, PROMPTS["dog"], x, now) - without
        shares.append(float((left * effect).sum() / effect.square().sum()))
        guided = without + GUIDANCE * effect
        clean = (x - (1 - alphas[now]).sqrt() * guided) / alphas[now].sqrt()
        x = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * guided
    changes = {}
    for name, text in PROMPTS.items():
        before, after = (noise(host, text, start, times[0]) for host in (model, patched))
        changes[name] = float((after - before).norm())
    (found,) = outcomes(model, patch, [DOG], NEAR)
    assert found.left == pytest.approx(sum(shares) / FIRST, rel=1e-4)
    assert 0.01 < abs(found.left - 1) < 1
    kept = {name: changes[name] / changes["dog"] for name in KEPT}
    assert found.kept == pytest.approx(kept, rel=1e-4)
    assert not traces(model.unet)


def test_an_empty_patch_leaves_all_and_changes_nothing():
    (found,) = outcomes(TinyModel(), make_patch(TINY, size=0.0), [DOG], NEAR)
    assert found.left == pytest.approx(1.0, abs=1e-5)
    assert found.kept == pytest.approx({"cat": 0, "wolf": 0}, abs=1e-3)


@pytest.mark.parametrize(
    ("trained_at", "side"), [(0, 256), (192, 192), (512, 256), (64, SMALLEST), (None, 256)]
)
def test_it_looks_at_no_larger_pictures_than_the_training(trained_at, side):
    model = TinyModel()
    model.family = replace(TINY, resolution=512)
    patch = make_patch(model.family)
    patch.info["settings"] = {} if trained_at is None else {"size": trained_at}
    outcomes(model, patch, [DOG])
    assert {x.shape[-1] for x, *_ in model.seen} == {side // 8}


def test_it_takes_few_forwards_however_many_concepts_there_are():
    """Of one prompt each."""
    counts = []
    for number in (1, 2, 40):
        model = TinyModel()
        concepts = [Concept(f"n{i}") for i in range(number)]
        near = [Neighbours(each.name, dict.fromkeys(KEPT, 0.5), KEPT) for each in concepts]
        found = outcomes(model, make_patch(TINY), concepts, near)
        counts.append((len(found), sum(len(x) for x, *_ in model.seen)))
    each = counts[0][1]
    assert each <= 12 and counts == [(1, each), (2, 2 * each), (3, 3 * each)]


def test_it_says_that_some_concepts_were_not_measured():
    one = Outcome("dog", 0.04, {}, 1.0)
    assert in_words([one], [DOG]) == ["dog: 4 % of its effect is left."]
    assert in_words([one], [DOG] * 5)[1:] == ["Only these 1 of 5 concepts were measured."]
    assert in_words([], [DOG]) == []


def test_it_is_said_in_plain_words():
    dog = Outcome("dog", 0.034, {"cat": 0.042, "wolf": 0.06}, 0.9)
    answer = "dog: 3 % of its effect is left. Nearest: cat changed by 4 %, wolf by 6 %."
    assert str(dog) == answer
    assert str(dog._replace(kept={})) == "dog: 3 % of its effect is left."
    unknown = str(dog._replace(concept="unicorn", strength=0.5))
    assert "may not know 'unicorn'" in unknown and "50 % as much as 'cat'" in unknown
    assert "not finite" in str(dog._replace(left=None))


def test_predictions_that_are_not_finite_are_no_number():
    model = TinyModel()
    model.poisoned = True
    (found,) = outcomes(model, make_patch(TINY), [DOG], NEAR)
    assert found.left is None
