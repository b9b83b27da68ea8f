"""Words learned from pictures, and prompts with them."""

import pytest
import torch

from fmn.errors import ForgetError, NonFiniteLoss
from fmn.models.sampling import DDPMSchedule
from fmn.models.token_positions import EOS_ID, tokenize_with_placeholders
from fmn.training.textual_inversion import PLACEHOLDER, Settings, initial_vectors, invert

from ..tiny import BOS, TinyModel, same_tensors, sections, weights_of, word_id

IMAGES = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 8, 8, 3)
QUICK = Settings(steps=4, batch=2, lr=0.05)


def ids_of(text):
    return sections([word_id(word) for word in text.split()], pad=0)


def run(settings=QUICK, model=None, images=IMAGES, on_step=lambda step: None):
    model = model or TinyModel()
    with model.borrow_denoiser() as denoiser:
        return invert(model, denoiser, images, settings, on_step)


@pytest.mark.parametrize("count", [1, 3])
def test_a_placeholder_takes_its_positions(count):
    ids = tokenize_with_placeholders(ids_of, "a photo of <*>, here", count)
    words = [word_id(word) for word in ("a", "photo", "of", ",", "here")]
    assert ids[: 6 + count] == [BOS, *words[:3], *[None] * count, *words[3:], EOS_ID][: 6 + count]
    assert ids[6 + count] == EOS_ID and ids[7 + count :] == [0] * (70 - count)
    assert len(ids) == 77


def test_a_prompt_without_placeholder_is_spelled_as_the_tokenizer_does():
    assert tokenize_with_placeholders(ids_of, "a photo of a dog", 0) == ids_of("a photo of a dog")
    assert tokenize_with_placeholders(ids_of, "", 0) == ids_of("")


def test_several_placeholders_each_take_all_vectors():
    ids = tokenize_with_placeholders(ids_of, "<*> and <*>", 2)
    assert [i for i, token in enumerate(ids) if token is None] == [1, 2, 4, 5]


def test_a_section_may_be_full():
    assert tokenize_with_placeholders(ids_of, "dog " * 74 + PLACEHOLDER, 1).index(EOS_ID) == 76


@pytest.mark.parametrize(
    "prompt, count, message",
    [
        ("a dog", 1, "no placeholder"),
        ("a <*>", 0, "has placeholder"),
        ("dog " * 76, 0, "has 76 tokens"),
        ("dog " * 74 + "<*>", 2, "has 76 tokens"),
    ],
)
def test_what_cannot_be_spelled_is_refused(prompt, count, message):
    with pytest.raises(ForgetError, match=message):
        tokenize_with_placeholders(ids_of, prompt, count)


def test_words_own_vectors_give_the_words_text():
    """The placeholder with the embeddings of "big dog" is "big dog"."""
    model = TinyModel()
    with model.borrow_text_encoder() as text:
        named, pooled = text.encode("a photo of big dog here")
        vectors = text.vectors("big dog").requires_grad_()
        placed, placed_pooled = text.encode("a photo of <*> here", vectors)
        placed.context.sum().backward()
    assert torch.equal(named.context, placed.context) and torch.equal(pooled, placed_pooled)
    assert torch.equal(vectors.grad, torch.ones(2, 12))


def test_inversion_finds_words_that_predict_the_noise_better():
    """From equal draws: the loss on fixed noise falls, and only because the tokens changed."""
    model = TinyModel()
    found = run(Settings(steps=20, batch=8, lr=0.1), model)
    assert found.vectors.shape == found.start.shape == (2, 12) and len(found.losses) == 20
    assert not torch.equal(found.vectors, found.start)

    def error(vectors):
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(32, 4, 8, 8, generator=generator)
        t = torch.arange(32) * 31
        with (
            model.borrow_denoiser() as denoiser,
            model.borrow_text_encoder() as text,
            torch.no_grad(),
        ):
            clean = model.encode_images(IMAGES, 64)[torch.arange(32) % 3]
            alpha = denoiser.alphas_cumprod[t].view(-1, 1, 1, 1)
            context = text.encode("a photo of <*>", vectors)[0].context.expand(32, -1, -1)
            x_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            return float((model.unet(x_t, t, context).sample - noise).square().mean())

    assert error(found.vectors) < error(found.start)


def test_the_model_comes_back_unchanged():
    model = TinyModel()
    unet, embedding = weights_of(model.unet), model.embedding.clone()
    run(model=model)
    assert same_tensors(weights_of(model.unet), unet)
    assert torch.equal(model.embedding, embedding)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.unet.parameters()
    )


def test_equal_seeds_give_equal_words():
    first, again, other = (run(Settings(steps=2, batch=2, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors) and first.losses == again.losses
    assert not torch.equal(first.vectors, other.vectors)


def test_it_works_where_gradients_are_off():
    """A sampler draws without gradients, ComfyUI runs nodes in inference mode."""
    models = TinyModel(), TinyModel()
    with torch.no_grad():
        first = run(model=models[0])
    with torch.inference_mode():
        second = run(model=models[1])
    assert torch.equal(first.vectors, second.vectors) and not second.vectors.is_inference()


def test_time_steps_are_spread_over_the_schedule():
    model = TinyModel()
    run(Settings(steps=3, batch=4), model)
    for _, t, text in model.seen:
        assert [int(step) // 250 for step in t] == [0, 1, 2, 3]
        assert len(text.context) == 4


def test_every_template_and_picture_is_used(monkeypatch):
    model, shown = TinyModel(), []
    noised = DDPMSchedule.noised
    monkeypatch.setattr(DDPMSchedule, "noised", lambda *a: shown.append(a[1]) or noised(*a))
    run(Settings(steps=8, batch=2, templates=("a photo of {}", "{} there")), model)
    with model.borrow_text_encoder() as text:
        known = text.encode("a")[0].context[0, 1]
    begins_with_a = [torch.equal(text.context[0, 1], known) for _, _, text in model.seen]
    assert any(begins_with_a) and not all(begins_with_a)
    assert {float(latent) for batch in shown for latent in batch[:, 0, 0, 0]} == {0, 0.5, 1}


def test_the_start():
    model = TinyModel()
    with model.borrow_text_encoder() as text:
        words = text.vectors("big dog")
        assert torch.equal(initial_vectors(text, Settings(start="big dog", tokens=1)), words[:1])
        longer = initial_vectors(text, Settings(start="big dog", tokens=3))
        assert torch.equal(longer, words[[0, 1, 0]])
        random = initial_vectors(text, Settings(tokens=5, seed=3))
        length = text.vectors("a photo of").norm(dim=1).mean()
        torch.testing.assert_close(random.norm(dim=1), length.expand(5))
        assert torch.equal(random, initial_vectors(text, Settings(tokens=5, seed=3)))
        assert not torch.equal(random, initial_vectors(text, Settings(tokens=5, seed=4)))


def test_each_step_is_reported_and_may_end_it():
    steps = []
    run(on_step=steps.append)
    assert [step.index for step in steps] == [1, 2, 3, 4] and steps[-1].total == 4

    def cancel(step):
        raise KeyboardInterrupt

    model = TinyModel()
    with pytest.raises(KeyboardInterrupt):
        run(model=model, on_step=cancel)
    assert len(model.seen) == 1
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_broken_model_is_said():
    model = TinyModel()
    model.poisoned = True
    with pytest.raises(NonFiniteLoss, match="not finite at step 1"):
        run(model=model)


@pytest.mark.parametrize("images", [None, torch.zeros(0, 8, 8, 3)])
def test_no_pictures_are_refused(images):
    with pytest.raises(ForgetError, match="no pictures to invert"):
        run(images=images)


BAD = {
    "tokens": (dict(tokens=0), "tokens is 0"),
    "many tokens": (dict(tokens=65), "tokens is 65"),
    "steps": (dict(steps=0), "steps is 0"),
    "batch": (dict(batch=0), "batch is 0"),
    "big batch": (dict(batch=257), "batch is 257"),
    "lr": (dict(lr=0.0), "lr is 0"),
    "large lr": (dict(lr=10.0), "lr is 10"),
    "seed": (dict(seed=-1), "seed is -1"),
    "no template": (dict(templates=()), "no template"),
    "no place": (dict(templates=("a dog",)), "0 placeholders"),
    "two places": (dict(templates=("{} and {}",)), "2 placeholders"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    values, message = BAD[case]
    with pytest.raises(ForgetError, match=message):
        Settings(**values)


def test_start_or_templates_without_words_are_refused():
    with pytest.raises(ForgetError, match="gives no tokens"):
        run(Settings(start="  "))
    with pytest.raises(ForgetError, match="gives no tokens"):
        run(Settings(templates=("{}",)))
