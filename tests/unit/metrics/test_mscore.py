"""M-Score on a model whose text is known."""

import json

import pytest
import torch

from fmn.errors import ForgetError
from fmn.metrics.mscore import Score, cosine, m_score, pooled, summary
from fmn.models.image_sampler import open_sampler
from fmn.models.sampling import Sampling
from fmn.training.textual_inversion import Settings

from ..tiny import TINY, TinyModel, make_patch, same_tensors, weights_of

IMAGES = torch.linspace(0, 1, 2).view(2, 1, 1, 1).expand(2, 8, 8, 3)
QUICK = Settings(steps=2, batch=2, lr=0.05)
TEMPLATES = "a photo of {}", "{} here"


def scores(**options):
    model = options.pop("model", None) or TinyModel()
    given = dict(seeds=(0, 1), settings=QUICK, templates=TEMPLATES) | options
    with model.borrow_denoiser() as denoiser:
        return m_score(model, denoiser, IMAGES, given.pop("phrase", "big dog"), **given)


def test_cosine_is_the_mean_over_rows():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert cosine(first, torch.tensor([[3.0, 0.0], [5.0, 0.0]])) == pytest.approx(0.5)
    assert cosine(first, -first) == pytest.approx(-1)


def test_the_name_against_itself_is_one():
    """Tokens that are the name's own embeddings score 1, other words less."""
    with TinyModel().borrow_text_encoder() as text:
        named = pooled(text, TEMPLATES, "big dog")
        placed = pooled(text, TEMPLATES, "<*>", text.vectors("big dog"))
        other = pooled(text, TEMPLATES, "<*>", text.vectors("red castle"))
    assert named.shape == (2, 12)
    assert cosine(named, placed) == pytest.approx(1)
    assert cosine(named, other) < 0.99


def test_one_inversion_is_one_score():
    found = scores(others=("red castle",))
    assert len(found) == 2 and found[0].value != found[1].value
    with TinyModel().borrow_text_encoder() as text:
        learned = pooled(text, TEMPLATES, "<*>", found[0].vectors)
        assert found[0].value == cosine(learned, pooled(text, TEMPLATES, "big dog"))
        assert found[0].others == {
            "red castle": cosine(learned, pooled(text, TEMPLATES, "red castle"))
        }
    assert all(-1 <= score.value <= 1 for score in found)


def test_words_that_already_are_the_concept_start_at_one():
    named = Settings(steps=1, batch=2, start="big dog", tokens=2)
    assert scores(settings=named)[0].start == pytest.approx(1)
    assert scores()[0].start < 0.99


def test_seed_and_templates_of_the_settings_are_replaced():
    other = Settings(steps=2, batch=2, lr=0.05, seed=9, templates=("not {} used",))
    for one, two in zip(scores(), scores(settings=other)):
        assert torch.equal(one.vectors, two.vectors)


def test_a_patch_changes_the_score_and_the_model_comes_back():
    model, patch = TinyModel(), make_patch(TINY, size=0.5)
    before = weights_of(model.unet)
    given = IMAGES, "big dog", TEMPLATES, (0, 1), QUICK, ("red castle",)
    with open_sampler(model, Sampling(2)) as sampler:
        untouched = m_score(model, sampler.denoiser, *given)
        with sampler.applying([(patch, 1.0)]):
            patched = m_score(model, sampler.denoiser, *given)
    found = summary(model, untouched, patched, "big dog", TEMPLATES)
    assert found["after"] != found["before"] and len(found["after"]) == 2
    assert set(found["others"]["red castle"]) == {"before", "after"}
    assert -1 <= found["between"]["red castle"] < 1
    assert json.loads(json.dumps(found)) == found
    assert same_tensors(weights_of(model.unet), before)


def test_other_braces_in_a_template_stay_as_they_are():
    with TinyModel().borrow_text_encoder() as text:
        named = pooled(text, ("a {big} photo of {}",), "big dog")
        assert torch.equal(named, text.encode("a {big} photo of big dog")[1])
    assert len(scores(templates=("a {big} photo of {}",), seeds=(0,))) == 1


def test_summary_keeps_the_order_of_seeds():
    def score(value):
        return Score(value, value / 2, {"red castle": -value}, torch.zeros(1, 12))

    found = summary(
        TinyModel(), [score(0.5), score(0.75)], [score(0.25), score(0)], "a dog", TEMPLATES
    )
    assert found["before"] == [0.5, 0.75] and found["after"] == [0.25, 0]
    assert found["start"] == [0.25, 0.375]
    assert found["others"] == {"red castle": {"before": [-0.5, -0.75], "after": [-0.25, 0]}}


def test_steps_are_reported_for_every_inversion():
    steps = []
    scores(on_step=steps.append)
    assert [step.index for step in steps] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(phrase=" "), "phrase that names the concept is empty"),
        (dict(seeds=()), "no seed"),
        (dict(templates=()), "no template"),
        (dict(templates=("a dog",)), "0 placeholders"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    model = TinyModel()
    with pytest.raises(ForgetError, match=message):
        scores(model=model, **options)
    assert not model.seen


def test_other_braces_of_a_template_stay():
    """They used to fail after all inversions."""
    found = scores(templates=("a {big} photo of {}",), seeds=(0,))
    with TinyModel().borrow_text_encoder() as text:
        learned = pooled(text, ("a {big} photo of {}",), "<*>", found[0].vectors)
        named = torch.cat([text.encode("a {big} photo of big dog")[1]])
    assert found[0].value == cosine(learned, named)
