"""Probes around the prompt: exact where they meet plain drawing, and what each one does."""

import pytest
import torch

from fmn.bench.measures.classifier import (
    ClassifierSettings,
    LatentClassifier,
    classifier,
    guide,
    labelled_latents,
    train_classifier,
)
from fmn.bench.measures.inpainting import (
    centred_hole,
    inpainted_latents,
    inpainting,
    smooth_hole,
)
from fmn.bench.measures.probing import completion, draw_latents, fresh_noise, noise
from fmn.bench.suite import Target, parse_suite
from fmn.errors import ForgetError
from fmn.models.families import FAMILIES
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling
from fmn.patches.patch import ForgetPatch

from ..tiny import TINY, TinyModel, make_scheduler, random_changes, same_tensors, weights_of
from ..worlds import GreyJudge, Sees, data, make_trial

ALPHAS = make_scheduler().alphas_cumprod
SMALL = ClassifierSettings(pictures=8, scales=(5.0,), hidden=(8,), steps=3, batch=4)


class Recorder(GreyJudge):
    """Keeps what it is shown, and finds a dog in those whose mean is above ``limit``."""

    def __init__(self, limit=0.5):
        self.limit, self.shown = limit, []

    def probabilities(self, images, domain):
        if domain == "concept":
            self.shown.append(images.clone())
        found = (images.mean((1, 2, 3)) > self.limit).long()
        return torch.nn.functional.one_hot(found, len(self.labels[domain])).float()


@pytest.fixture
def sampler():
    with open_sampler(TinyModel(), Sampling(4, 2.0), batch=2) as opened:
        yield opened


@pytest.fixture
def worn(sampler, monkeypatch):
    monkeypatch.setitem(FAMILIES, "tiny", TINY)
    patch = ForgetPatch(TINY, random_changes(TINY, 2, size=3.0), {})
    with sampler.applying([(patch, 1.0)]):
        yield sampler


def test_completion_is_plain_at_one_end_and_untouched_at_the_other(worn):
    judge = Recorder()
    trial = make_trial(worn, judge=judge)
    asks = trial.target_asks()
    plain, untouched = trial.draw(asks), trial.untouched(asks)
    assert not torch.equal(plain, untouched)
    result = completion(trial, (0, 0.5, 1))
    assert [row["steps"] for row in result["rows"]] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    shown = judge.shown[::2]  # each is followed by the untouched pictures
    assert torch.equal(shown[0], plain) and torch.equal(shown[2], untouched)
    assert not torch.equal(shown[1], plain) and not torch.equal(shown[1], untouched)
    again = trial.draw(asks)
    assert torch.equal(again, plain)  # the patch is on again


def test_completion_hands_over_after_the_first_steps(worn):
    trial, seen = make_trial(worn, count=1), worn.model.seen
    patched = [switch for switch, _ in worn._applied]
    on = []
    denoise = worn.denoiser.predict_noise
    worn.denoiser.predict_noise = lambda *args: on.append(patched[0].on) or denoise(*args)
    trial.untouched(trial.target_asks())
    on.clear()
    completion(trial, (0.25,))
    assert on == [False, True, True, True] and len(seen) == 8


def test_noise_goes_over_its_grid_and_the_best_counts(worn):
    judge = Recorder()
    trial = make_trial(worn, judge=judge, count=2)
    asks = trial.target_asks()
    plain = trial.draw(asks)
    result = noise(trial, etas=(0.0, 1.0, 1.5), spreads=(1.0, 1.1))
    cells = [[0.0, 1.0], [1.0, 1.0], [1.0, 1.1], [1.5, 1.0], [1.5, 1.1]]
    assert result["cells"] == cells
    assert len(judge.shown) == 6 and torch.equal(judge.shown[0], plain)
    assert all(not torch.equal(a, b) for a, b in zip(judge.shown, judge.shown[1:]))
    for i, row in enumerate(result["rows"]):
        found = [bool(images[i].mean() > 0.5) for images in judge.shown[:5]]
        assert row["cells"] == found and row["still"] is any(found)


def test_one_cell_is_enough_to_count(sampler):
    calls = []

    class Once(GreyJudge):
        def probabilities(self, images, domain):
            if domain == "concept":
                calls.append(1)
            found = torch.full((len(images),), 1 if len(calls) == 2 else 0)
            return torch.nn.functional.one_hot(found, len(self.labels[domain])).float()

    rows = noise(make_trial(sampler, judge=Once(), count=1), etas=(1.0,), spreads=(1.0, 1.1))[
        "rows"
    ]
    assert all(row["cells"] == [False, True, False] and row["still"] for row in rows)
    assert not any(row["untouched"] for row in rows)


def test_fresh_noise_belongs_to_its_picture(sampler):
    def draw(seeds, x):
        text = sampler.texts(["a dog"] * len(seeds))
        return sampler.latents(text, x, eta=1.2, spread=1.1, fresh=fresh_noise(seeds))

    x = sampler.noise([1, 2])
    both, alone, other = draw([1, 2], x), draw([2], x[1:]), draw([3], x[1:])
    assert torch.allclose(both[1:], alone, atol=1e-4)
    assert not torch.allclose(alone, other, atol=1e-2)


def test_the_probe_leaves_the_global_generator_alone(sampler):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    trial = make_trial(sampler, count=1)
    noise(trial, etas=(1.0,), spreads=(1.0,))
    classifier(trial, SMALL)
    assert torch.equal(torch.get_rng_state(), state)


def test_guidance_moves_the_latent_toward_the_class():
    latents = torch.zeros(1, 4, 2, 2)
    network = LatentClassifier(latents, ())
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network.layers[0].weight.copy_(torch.cat([direction, torch.zeros(2)])[None])
        network.layers[0].bias.zero_()
    alpha = torch.tensor(0.25)
    x, noise_before = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    noise_after = guide(network, 8.0)(x, noise_before, 999, alpha)
    # At logit 0 the gradient of log p is half the direction.
    wanted = -8.0 * 0.75**0.5 * 0.5 * direction.view(1, 4, 2, 2)
    assert torch.allclose(noise_after, wanted, atol=1e-6)
    clean = (x - (1 - alpha).sqrt() * noise_after) / alpha.sqrt()
    assert network(clean, alpha) > network(x, alpha)


def test_a_classifier_learns_to_tell_latents():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.arange(40) < 20
    latents = 0.3 * torch.randn(40, 4, 4, 4, generator=generator)
    latents[wanted] += 1
    settings = ClassifierSettings(hidden=(16,), steps=150, batch=32, lr=0.01)
    network, accuracy = train_classifier(latents, wanted, ALPHAS, settings, 0)
    assert accuracy[0] > 0.95 and accuracy[0] >= accuracy[2] and len(accuracy) == 3
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    logits = network(latents, ALPHAS[0])
    assert ((logits > 0) == wanted).float().mean() > 0.95
    again, _ = train_classifier(latents, wanted, ALPHAS, settings, 0)
    assert same_tensors(network.state_dict(), again.state_dict())


def test_a_classifier_needs_both_kinds():
    with pytest.raises(ForgetError, match="both kinds"):
        train_classifier(torch.zeros(8, 4, 2, 2), torch.ones(8) > 0, ALPHAS, SMALL, 0)


def test_examples_are_other_pictures_than_those_asked_for(sampler):
    trial = make_trial(sampler)
    latents, wanted = labelled_latents(trial, 8)
    assert latents.shape == (16, 4, 8, 8) and wanted.tolist() == [True] * 8 + [False] * 8
    prompts = [prompt for prompt, _ in trial.cache]
    assert sum("dog" in prompt for prompt in prompts) == 8
    assert all("cat" in prompt or "tree" in prompt for prompt in prompts if "dog" not in prompt)
    assert not {ask.seed for ask in trial.target_asks()} & {seed for _, seed in trial.cache}
    style = make_trial(sampler, "light")
    labelled_latents(style, 8)
    others = [prompt for prompt, _ in style.cache if "light" not in prompt]
    assert len(others) == 8 and all(prompt == "a tree in dark" for prompt in others)


def test_nothing_to_tell_from(sampler):
    suite = parse_suite(data(far=["dog"], targets=[{"name": "dog", "kind": "object"}]), "one")
    with pytest.raises(ForgetError, match="nothing to tell 'dog' from"):
        labelled_latents(make_trial(sampler, suite.targets[0], suite=suite), 8)


def test_classifier_probe(worn):
    judge = Recorder(-1)  # a dog in all pictures
    trial = make_trial(worn, judge=judge)
    asks = trial.target_asks()
    plain, before = trial.draw(asks), weights_of(worn.model.unet)
    result = classifier(trial, SMALL)
    assert result["cells"] == [0.0, 5.0] and len(result["accuracy"]) == 3
    assert all(row["cells"] == [True, True] and row["still"] for row in result["rows"])
    assert torch.equal(judge.shown[1], plain)  # after the examples, scale 0
    assert not torch.equal(judge.shown[2], plain)
    assert same_tensors(weights_of(worn.model.unet), before)


def test_the_hole_is_the_middle_half():
    hole = centred_hole(8)
    assert hole.sum() == 16 and hole[2:6, 2:6].all()
    # Of a latent and of its picture the same.
    assert torch.equal(
        centred_hole(64), centred_hole(8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    )


def test_inpainting_keeps_the_outside_exactly_and_fills_the_hole(sampler):
    text, start = sampler.texts(["a dog"] * 2), sampler.noise([1, 2])
    known = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    filled = inpainted_latents(sampler, text, start, known)
    hole = centred_hole(8)
    assert torch.equal(filled[..., ~hole], known[..., ~hole])
    # What lies in the hole of the known latents cannot matter.
    secret = known.clone()
    secret[..., hole] = 5
    assert torch.equal(inpainted_latents(sampler, text, start, secret), filled)
    assert not torch.allclose(filled[..., hole], sampler.latents(text, start)[..., hole])


def test_inpainting_sees_the_outside_at_each_steps_noise(sampler):
    text, start, known = sampler.texts(["a dog"]), sampler.noise([1]), torch.full((1, 4, 8, 8), 2.0)
    sampler.model.seen.clear()
    inpainted_latents(sampler, text, start, known)
    outside = ~centred_hole(8)
    seen = sampler.model.seen
    assert torch.equal(seen[0][0][:1], start)
    for x, t, _ in seen[1:]:
        alpha = ALPHAS[int(t[0])]
        wanted = alpha.sqrt() * known + (1 - alpha).sqrt() * start
        assert torch.allclose(x[:1][..., outside], wanted[..., outside], atol=1e-6)


def test_what_the_encoder_sees_is_grey_in_the_hole(sampler, monkeypatch):
    seen, encode = [], sampler.model.encode_images

    def watched(images, size):
        seen.append((images, size))
        return encode(images, size)

    monkeypatch.setattr(sampler.model, "encode_images", watched)
    trial = make_trial(sampler)
    pictures, hole = trial.untouched(trial.target_asks()), centred_hole(64)
    inpainting(trial)
    for images, size in seen:
        assert size == 64 and (images[:, hole] == 0.5).all()
        assert torch.equal(images[:, ~hole], pictures[:, ~hole])


def test_a_smooth_hole_continues_its_surroundings():
    ramp = torch.linspace(0, 1, 16).view(1, 1, 16, 1).expand(1, 16, 16, 3).contiguous()
    for picture in (ramp, ramp.transpose(1, 2).contiguous(), torch.full((2, 16, 16, 3), 0.3)):
        holed = picture.clone()
        holed[:, 4:12, 4:12] = 9
        assert torch.allclose(smooth_hole(holed), picture, atol=1e-6)


def test_inpainting_judges_hole_and_whole(worn):
    judge = Recorder()
    trial = make_trial(worn, judge=judge)
    pictures = trial.untouched(trial.target_asks())
    result = inpainting(trial)
    alone, before, whole, before_whole, white, smooth = judge.shown
    hole = centred_hole(64)
    for images in (alone, before):
        assert (images[:, ~hole] == 1).all()
    for images in (whole, before_whole, white, smooth):
        assert torch.equal(images[:, ~hole], pictures[:, ~hole])
    assert (white[:, hole] == 1).all()
    assert torch.equal(alone[:, hole], whole[:, hole])
    assert not torch.equal(alone, before)
    names = {"prompt", "seed", "still", "untouched", "whole", "untouched_whole", "white", "smooth"}
    assert all(set(row) == names for row in result["rows"])
    # The untouched model's part is kept, and is what it gives without patches.
    with worn.unpatched():
        judge.shown.clear()
        inpainting(make_trial(worn, judge=judge, cache=dict(trial.cache)))
    assert torch.equal(judge.shown[0], before) and torch.equal(judge.shown[1], before)
    kept, calls = dict(trial.cache), len(worn.model.seen)
    inpainting(make_trial(worn, judge=judge, cache=kept))
    assert len(worn.model.seen) - calls == 2 * 4  # two batches, four steps: nothing untouched


def test_drawn_is_plain_drawing_in_batches(worn):
    told = []
    worn.on_pictures = told.append
    trial = make_trial(worn)
    asks = trial.target_asks()
    images = draw_latents(trial, asks, lambda part, text, start: worn.latents(text, start))
    assert told == [2, 1] and torch.equal(images, trial.draw(asks))


def test_every_probe_works_for_styles_and_unsafe_content(sampler):
    unsafe = Target("gore", "unsafe", prompts={"pictures": ("a dog bites", "a cat bites")})
    judge = Sees()
    judge.labels = GreyJudge.labels | {"unsafe": ("safe", "unsafe")}
    judge.found["unsafe"] = "unsafe"
    for target in ("light", unsafe):
        trial = make_trial(sampler, target, judge=judge, count=2)
        for result in (
            completion(trial, (0.5,)),
            noise(trial, (1.0,), (1.0,)),
            classifier(trial, SMALL),
            inpainting(trial),
        ):
            assert len(result["rows"]) == 2
            assert all(row["still"] and row["untouched"] for row in result["rows"])
