"""Concept Ablation's loss and gradient against the paper's written out once more, and its runs."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.func import functional_call

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.methods.ablation import PRESETS, Batches, Pair, Settings, prepare, prompt_pairs, run
from fmn.training import fit_adapters
from fmn.training.loop import Trainer
from tests.unit.tiny import TinyDenoiser, TinyModel, make_scheduler

ALPHAS = make_scheduler().alphas_cumprod
DOG = Concept("dog", anchor="cat")
MUSK = Concept("elon musk", "identity", aliases=("elon",), anchor="a man")
LONG = " ".join(f"w{i}" for i in range(80))
QUICK = Settings(steps=3, samples=1, batch=2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "all"}, "layers is 'all': choose one of kv, attention, unet"),
        ({"target": "image"}, "choose one of model, noise"),
        ({"teacher": "old"}, "choose one of frozen, current"),
        ({"references": "none"}, "choose one of samples, pictures, zeros"),
        ({"no_anchor": "person"}, "choose one of empty, rest"),
        ({"prior": -1.0}, "prior is -1"),
        ({"samples": 0}, "samples is 0"),
        ({"references": "zeros", "target": "noise"}, "target 'noise' learns from pictures"),
        ({"references": "zeros", "prior": 0.5}, "prior 0.5 learns from pictures"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ForgetError, match=message):
        Settings(**wrong)


def test_released_settings():
    released = PRESETS["ablation-released"]
    assert released.lr == pytest.approx(2e-6 * released.batch) and released.batch == 4
    assert (released.steps, released.layers, released.full_weights) == (200, "kv", True)
    assert (released.target, released.teacher, released.prior) == ("model", "current", 0)
    assert released.detach_start and released.references == "samples"


def test_each_prompt_has_its_anchors():
    concept = replace(MUSK, prompts=("Elon Musk in a car", "elon and elon musk"))
    assert prompt_pairs(concept) == [
        (Prompt("a photo of elon musk", "elon musk"), Prompt("a photo of a man", "a man")),
        (Prompt("a photo of elon", "elon"), Prompt("a photo of a man", "a man")),
        (
            Prompt("Elon Musk in a car", "elon musk", False),
            Prompt("a man in a car", "a man", False),
        ),
        (
            Prompt("elon and elon musk", "elon musk", False),
            Prompt("a man and a man", "a man", False),
        ),
    ]
    assert prompt_pairs(concept, "rest") == prompt_pairs(concept)


def test_without_an_anchor_it_is_the_empty_prompt():
    concept = Concept("dog", prompts=("a dog, twemoji",))
    assert [anchor for _, anchor in prompt_pairs(concept)] == [
        Prompt("", ""),
        Prompt("", "", False),
    ]


@pytest.mark.parametrize(
    "prompt, rest",
    [
        ("a dog", ""),
        ("a dog, twemoji", "twemoji"),
        ("twemoji of a dog", "twemoji"),
        ("a cat and a dog, twemoji", "a cat, twemoji"),
        ("dog and a cat", "a cat"),
        ("dog of a lady", "a lady"),
        ("a photo of a dog in the style of twemoji", "a photo in the style of twemoji"),
        ("a castle in the style of dog", "a castle"),
        ("a castle, dog", "a castle"),
        ("a castle by dog", "a castle"),
        ("a dog castle, twemoji", "a castle, twemoji"),
        ("the dog in a forest", "in a forest"),
        ("A Dog castle by The dog", "A castle"),
        ("a puppy on a hill", "on a hill"),
        ("office, a dog", "office"),
    ],
)
def test_the_rest_of_a_prompt(prompt, rest):
    concept = Concept("dog", "custom", aliases=("puppy",), prompts=(prompt,))
    assert [anchor.text for _, anchor in prompt_pairs(concept, "rest")] == [rest]


def test_the_rest_of_templates():
    style = prompt_pairs(Concept("van gogh", "style"), "rest")
    assert [anchor for _, anchor in style] == [Prompt("a photo", "")]


def test_pictures_are_drawn_once_for_each_anchor(monkeypatch):
    model, asked = TinyModel(), []

    def sample(*args):
        asked.append(args)
        return TinyModel.sample(model, *args)

    monkeypatch.setattr(model, "sample", sample)
    settings = Settings(samples=3, sample_steps=7, guidance=2.5, seed=5, size=128)
    pairs = prepare(model, replace(MUSK, prompts=("elon, drawn",)), settings)
    assert asked == [
        (Prompt("a photo of a man", "a man"), range(5, 8), 128, 7, 2.5),
        (Prompt("a man, drawn", "a man", False), range(5, 8), 128, 7, 2.5),
    ]
    assert [pair.latents.shape for pair in pairs] == [(3, 4, 16, 16)] * 3
    assert torch.equal(
        pairs[0].target.context, model.encode(Prompt("a photo of elon musk", "")).context
    )
    assert torch.equal(
        pairs[0].anchor.context, model.encode(Prompt("a photo of a man", "")).context
    )


def test_references():
    model = TinyModel()
    images = torch.stack([torch.full((9, 9, 3), v) for v in (0.2, 0.7)])
    shown = replace(DOG, images=images)
    [zeros] = prepare(model, shown, Settings(references="zeros"))
    assert zeros.latents.shape == (1, 4, 8, 8) and not zeros.latents.any()
    [pictures] = prepare(model, shown, Settings(references="pictures"))
    assert torch.equal(pictures.latents, model.encode_images(images, 64))
    with pytest.raises(ForgetError, match="'dog' has no pictures"):
        prepare(model, DOG, Settings(references="pictures"))
    model.encode_images = lambda images, size: torch.zeros(1, 16, 8, 8)
    with pytest.raises(ForgetError, match="16 channels"):
        prepare(model, shown, Settings(references="pictures"))


class StartDetached(AttnProcessor):
    """Custom Diffusion's processor, which the released code uses: k and v of token 0 detached."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        query = attn.to_q(hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        modifier = torch.ones_like(key)
        modifier[:, :1, :] = 0.0
        key = modifier * key + (1 - modifier) * key.detach()
        value = modifier * value + (1 - modifier) * value.detach()
        query, key, value = (attn.head_to_batch_dim(each) for each in (query, key, value))
        probabilities = attn.get_attention_scores(query, key, None)
        mixed = attn.batch_to_head_dim(torch.bmm(probabilities, value))
        return attn.to_out[0](mixed)


def literal_loss(unet, changes, rows, settings, detach_start):
    """The loss of section 3, a row at a time.

    Args:
        changes: layer name -> what is added to its weight. rows: (x_t, t, noise, c*, c) each.
    """
    unet = copy.deepcopy(unet).requires_grad_(False)
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(StartDetached() if detach_start else AttnProcessor())
    own = {
        f"{name}.weight": unet.get_submodule(name).weight + change
        for name, change in changes.items()
    }

    def noise_of(weights, x_t, t, context):
        return functional_call(unet, weights, (x_t, t, context)).sample

    ablation_part, prior_part = [], []
    for x_t, t, noise, target, anchor in rows:
        if settings.target == "noise":
            wanted = noise
        else:
            wanted = noise_of(own if settings.teacher == "current" else {}, x_t, t, anchor).detach()
        ablation_part.append((noise_of(own, x_t, t, target) - wanted).square().sum())
        prior_part.append((noise_of(own, x_t, t, anchor) - noise).square().sum())
    count = sum(row[2].numel() for row in rows)
    return (sum(ablation_part) + settings.prior * sum(prior_part)) / count


class Captured(Exception):
    """Ends a run before its first optimiser step."""


def first_step(monkeypatch, model, concepts, settings, keep=()):
    """Loss and adapters with gradients of a run's first step, with changes that are not zero, and
    what was drawn: a list of rows for ``literal_loss`` for each call of a ``Batches``."""
    caught = {"drawn": []}
    make_adapters, draw = fit_adapters.make_adapters, Batches.__call__

    def made(*args):
        caught["adapters"] = make_adapters(*args)
        return caught["adapters"]

    def drawn(self):
        batches = draw(self)
        rows = []
        for batch in batches:
            for i in range(len(batch.t)):
                texts = batch.target.context[i : i + 1], batch.anchor.context[i : i + 1]
                parts = batch.x_t[i : i + 1], batch.t[i : i + 1], batch.noise[i : i + 1]
                rows.append((*parts, *texts))
        caught["drawn"].append(rows)
        return batches

    def first(trainer, loss_at):
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in trainer.parameters:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        loss = sum(loss_at(0))
        loss.backward()
        caught["loss"] = loss.detach()
        raise Captured

    with monkeypatch.context() as patched, pytest.raises(Captured):
        patched.setattr(fit_adapters, "make_adapters", made)
        patched.setattr(Batches, "__call__", drawn)
        patched.setattr(Trainer, "run", first)
        run(model, concepts, settings, keep=keep)
    return caught


def leaves_of(adapters, full):
    """Copies of the adapters' parameters to differentiate by, and the changes they make."""
    leaves, changes = {}, {}
    for name, adapter in adapters.items():
        for part, parameter in adapter.named_parameters():
            leaves[name, part] = parameter.detach().clone().requires_grad_()
        if full:
            changes[name] = leaves[name, "change"]
        else:
            changes[name] = leaves[name, "up"] @ leaves[name, "down"]
    return leaves, changes


def assert_same_gradients(adapters, leaves, loss):
    expected = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, part), gradient in zip(leaves, expected):
        found = dict(adapters[name].named_parameters())[part].grad
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("full", [False, True], ids=["low-rank", "full"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"teacher": "current"},
        {"detach_start": False},
        {"target": "noise"},
        {"prior": 0.7},
        {"prior": 0.7, "teacher": "current", "layers": "attention"},
    ],
    ids=lambda changed: "-".join(map(str, changed.values())) or "defaults",
)
def test_equals_the_paper(monkeypatch, full, changed):
    """Loss and gradients, of two concepts whose prompts differ in length."""
    model = TinyModel()
    concepts = [DOG, Concept("elf", "custom", prompts=(f"elf {LONG}",))]
    settings = Settings(full_weights=full, rank=2, batch=4, no_anchor="empty", **changed)
    caught = first_step(monkeypatch, model, concepts, settings)
    [rows] = caught["drawn"]
    lengths = Counter((row[3].shape[1], row[4].shape[1]) for row in rows)
    assert lengths == {(77, 77): 2, (154, 77): 2}  # the empty prompt is short

    leaves, changes = leaves_of(caught["adapters"], full)
    loss = literal_loss(model.unet, changes, rows, settings, settings.detach_start)
    torch.testing.assert_close(caught["loss"], loss.detach(), rtol=1e-4, atol=0)
    assert_same_gradients(caught["adapters"], leaves, loss)


@pytest.mark.parametrize("changed", [{"detach_start": False}, {"teacher": "current"}])
def test_those_settings_change_the_gradient(monkeypatch, changed):
    """So that the comparison above can fail."""
    caught = [
        first_step(monkeypatch, TinyModel(), [DOG], replace(QUICK, **each))
        for each in ({}, changed)
    ]
    ups = [each["adapters"]["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"].up.grad
           for each in caught]  # fmt: skip
    assert float((ups[0] - ups[1]).norm()) > 1e-2 * float(ups[0].norm())


def test_what_is_kept_is_drawn_as_by_the_frozen_model(monkeypatch):
    model, keep = TinyModel(), ("a wolf", "fox")
    settings = Settings(preserve=2.5, teacher="current", prior=0.3, samples=1)
    caught = first_step(monkeypatch, model, [DOG], settings, keep)
    rows, kept = caught["drawn"]
    contexts = [model.encode(Prompt(text, text)).context for text in keep]
    for row in kept:
        assert torch.equal(row[3], row[4]) and any(torch.equal(row[3], c) for c in contexts)

    leaves, changes = leaves_of(caught["adapters"], False)
    frozen = Settings(teacher="frozen")
    loss = literal_loss(model.unet, changes, rows, settings, True)
    loss = loss + 2.5 * literal_loss(model.unet, changes, kept, frozen, True)
    torch.testing.assert_close(caught["loss"], loss.detach(), rtol=1e-4, atol=0)
    assert_same_gradients(caught["adapters"], leaves, loss)


def test_keep_words_count_only_with_a_weight(monkeypatch):
    settings = replace(QUICK, preserve=0.0)
    caught = first_step(monkeypatch, TinyModel(), [DOG], settings, ("dog",))
    assert len(caught["drawn"]) == 1
    with pytest.raises(ForgetError, match="'dog' is both to be kept and to be forgotten"):
        run(TinyModel(), [DOG], QUICK, keep=("dog",))


def test_draws_take_turns_and_noise_the_anchors_pictures():
    model = TinyModel()
    encoded = {word: model.encode(Prompt(word, word)) for word in ("dog", "cat", "elf", "man")}
    latents = torch.stack([torch.full((4, 8, 8), v) for v in (1.0, -1.0)])
    pairs = [
        [
            Pair(encoded["dog"], encoded["cat"], latents),
            Pair(encoded["cat"], encoded["cat"], latents),
        ],
        [Pair(encoded["elf"], encoded["man"], latents)],
    ]
    draws = Batches(pairs, 8, torch.Generator().manual_seed(0), TinyDenoiser(model))
    counted, times, starts = Counter(), set(), set()
    for _ in range(10):
        [batch] = draws()
        assert batch.x_t.shape == (8, 4, 8, 8)
        alpha = ALPHAS[batch.t].view(-1, 1, 1, 1)
        clean = (batch.x_t - (1 - alpha).sqrt() * batch.noise) / alpha.sqrt()
        starts |= {round(float(value), 1) for value in clean[alpha.flatten() > 0.1].mean((1, 2, 3))}
        times |= set(batch.t.tolist())
        for context in batch.target.context:
            [word] = [w for w, text in encoded.items() if torch.equal(text.context[0], context)]
            counted[word] += 1
    assert counted == {"dog": 20, "cat": 20, "elf": 40}
    assert starts == {1.0, -1.0}
    assert len(times) > 60 and min(times) < 100 and max(times) > 900
