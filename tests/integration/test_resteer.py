"""Re-steering's draws, loss and gradient, against the released algorithm written out once more."""

import copy
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from fmn.concepts.concept import Concept
from fmn.methods import resteer
from fmn.methods.resteer import Batches, Data, Example, Settings, prepare
from fmn.models.interface import Text
from fmn.models.token_positions import EOS_ID
from fmn.training import fit_adapters
from fmn.training.loop import Trainer
from tests.unit.tiny import TinyModel, make_scheduler, word_id

MUSK = Concept("elon musk", "identity")
DOG = Concept("dog")
STYLE = Concept("van gogh painting", "style")
ALPHAS = make_scheduler().alphas_cumprod


def released_loss(unet, x_t, t, context, flagged):
    """train_attn.py's loss for a batch of one.

    Args:
        flagged: positions of the concept's tokens and, with use_pooler, of every EOT.
    """
    kept = []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(AttnProcessor())

            def recorded(*args, get_attention_scores=module.get_attention_scores):
                probabilities = get_attention_scores(*args)  # [heads, pixels, tokens]
                kept.append(probabilities[:, :, flagged].reshape(-1))
                return probabilities

            module.get_attention_scores = recorded
    unet(x_t, t, context)
    assert len(kept) == 7
    return torch.norm(torch.cat(kept))


def released_positions(model, concept, use_pooler=False):
    (prompt,) = concept.training_prompts()
    ids, run = model.tokenize(prompt), [word_id(word) for word in concept.name.split()]
    flagged = set()
    for i, token in enumerate(ids):
        if ids[i : i + len(run)] == run:
            flagged.update(range(i, i + len(run)))
        if use_pooler and token == EOS_ID:
            flagged.add(i)
    return sorted(flagged)


def assert_same_gradient(ours, expected):
    if expected is None:
        assert ours is None
        return
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * scale)


class Captured(Exception):
    """Ends a run before its first optimiser step."""


def first_step(model, concepts, settings, monkeypatch):
    """Loss, gradient of each adapter parameter by layer name, and the U-Net's inputs."""
    caught = {}

    def make_adapters(*args):
        caught["adapters"] = original(*args)
        return caught["adapters"]

    def first(trainer, loss_at):
        model.seen.clear()
        loss = loss_at(0)
        caught["seen"] = list(model.seen)
        loss.backward()
        caught["loss"] = loss.detach()
        raise Captured

    original = fit_adapters.make_adapters
    with monkeypatch.context() as patched, pytest.raises(Captured):
        patched.setattr(fit_adapters, "make_adapters", make_adapters)
        patched.setattr(Trainer, "run", first)
        resteer.run(model, concepts, settings)
    gradients = {
        f"{name}.{part}": parameter.grad
        for name, adapter in caught["adapters"].items()
        for part, parameter in adapter.named_parameters()
    }
    return caught["loss"], gradients, caught["seen"]


@pytest.mark.parametrize("scope", ["attention", "unet"])
@pytest.mark.parametrize("pad", [EOS_ID, 0], ids=["sd1-padding", "sd2-padding"])
@pytest.mark.parametrize("use_pooler", [False, True])
def test_equals_the_released_algorithm(monkeypatch, scope, pad, use_pooler):
    model = TinyModel(pad)
    settings = Settings(
        layers=scope, full_weights=True, end_tokens="all" if use_pooler else "none",
        references="samples", samples=1, seed=7,
    )  # fmt: skip
    loss, gradients, seen = first_step(model, [MUSK], settings, monkeypatch)

    (prompt,) = MUSK.training_prompts()
    flagged = released_positions(model, MUSK, use_pooler)
    assert len(flagged) == 2 + use_pooler * (71 if pad == EOS_ID else 1)
    # Noise and time step are ours; noising and everything after is the reference's own.
    [(ours_x_t, t, _)] = seen
    noise = noise_of_draw(model, settings, t)
    reference = model.sample(prompt, [settings.seed], 64, None, None)
    x_t = make_scheduler().add_noise(reference, noise, t)
    torch.testing.assert_close(ours_x_t, x_t)

    unet = copy.deepcopy(model.unet).requires_grad_(True)
    expected = released_loss(unet, x_t, t, model.encode(prompt).context, flagged)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    trained = {
        name: module.weight.grad
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and (scope == "unet" or ".attn2." in name)
    }
    assert {f"{name}.change" for name in trained} == gradients.keys()
    for name, gradient in trained.items():
        assert_same_gradient(gradients[f"{name}.change"], gradient)
    last = "up_blocks.1.attentions.1.transformer_blocks.0."
    behind = {last + "attn2.to_v", last + "attn2.to_out.0"}
    if scope == "unet":
        behind |= {last + "ff.net.0.proj", last + "ff.net.2"}
        behind |= {"up_blocks.1.attentions.1.proj_out", "conv_out"}
    assert {name for name, gradient in trained.items() if gradient is None} == behind


def noise_of_draw(model, settings, t):
    """The noise that a seed draws: x_t where alphas are zero and nothing else is left."""
    (batch,) = Batches(prepare(model, [MUSK], settings), settings, ALPHAS * 0, "cpu")()
    assert torch.equal(batch.t, t)
    return batch.x_t


def test_a_batch_is_the_norm_over_its_samples(monkeypatch):
    """Concepts of one, two and three tokens in one batch, which the released code mixes up."""
    concepts = [DOG, MUSK, STYLE]
    model = TinyModel()
    settings = Settings(layers="attention", full_weights=True, batch=3)
    loss, gradients, seen = first_step(model, concepts, settings, monkeypatch)
    [(x_t, t, text)] = seen

    unet, squares = copy.deepcopy(model.unet).requires_grad_(True), []
    for concept in concepts:
        context = model.encode(*concept.training_prompts()).context
        (row,) = (text.context == context).all((1, 2)).nonzero()[0]
        row = slice(row, row + 1)
        flagged = released_positions(model, concept)
        assert len(flagged) == len(concept.name.split())
        single = copy.deepcopy(model.unet).requires_grad_(True)
        square = released_loss(single, x_t[row], t[row], context, flagged).square()
        square.backward()
        squares.append(square.detach())
        for total, one in zip(unet.parameters(), single.parameters()):
            if one.grad is not None:
                total.grad = one.grad if total.grad is None else total.grad + one.grad
    torch.testing.assert_close(loss, sum(squares).sqrt())
    for name, gradient in gradients.items():
        total = unet.get_parameter(name.replace(".change", ".weight")).grad
        # The slope of the root of a sum s is that of s over 2 sqrt(s).
        assert_same_gradient(gradient, None if total is None else total / (2 * loss))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompts_of_different_lengths_in_one_batch(monkeypatch, checkpointing):
    long = Concept("dog", "custom", prompts=("word " * 80 + "dog",))
    model = TinyModel()
    settings = Settings(full_weights=True, batch=2, checkpointing=checkpointing)
    loss, gradient, seen = first_step(model, [MUSK, long], settings, monkeypatch)
    assert any(value is not None and value.abs().max() > 0 for value in gradient.values())
    assert [text.context.shape[1] for _, _, text in seen] == [77, 154]
    singles = [
        released_loss(
            copy.deepcopy(model.unet), x_t, t, text.context, released_positions(model, concept)
        ).detach()
        for concept, (x_t, t, text) in zip((MUSK, long), seen)
    ]
    torch.testing.assert_close(loss, torch.stack(singles).norm())


@pytest.mark.parametrize("scope, full", [("kv", False), ("attention", True), ("unet", False)])
def test_checkpointing_changes_nothing_but_memory(monkeypatch, scope, full):
    model, runs = TinyModel(), {}
    for checkpointing in (False, True):
        calls = []
        block = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        handle = block.register_forward_hook(
            lambda module, args, output, calls=calls: calls.append(type(output))
        )
        settings = Settings(layers=scope, full_weights=full, checkpointing=checkpointing)
        runs[checkpointing] = first_step(model, [MUSK, DOG], settings, monkeypatch)[:2]
        handle.remove()
        # To measure attention, to estimate memory, to train, and once more in backward.
        assert calls.count(torch.Tensor) == 3 + checkpointing
    (loss, gradients), (again, recomputed) = runs[False], runs[True]
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        if full or name.endswith("up"):  # down's gradient is zero while up is
            assert_same_gradient(recomputed[name], gradient)


def make_data(latents, examples=1):
    """Data of one concept with that many prompts, the text of the i-th being i."""
    flags = torch.ones(1, 77, dtype=torch.bool)
    texts = [Text(torch.full((1, 77, 1), float(i))) for i in range(examples)]
    return Data([Example(0, text, flags) for text in texts], [latents])


def test_draws_noise_the_reference():
    """Equal seeds draw equal noise, which a schedule of zero alphas shows bare."""
    clean = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(9))
    data, noises = make_data(clean), []
    bare, draws = (
        Batches(data, Settings(batch=8), alphas, "cpu") for alphas in (ALPHAS * 0, ALPHAS)
    )
    for _ in range(100):
        ([noise], [batch]) = bare(), draws()
        assert torch.equal(noise.t, batch.t)
        x_t = make_scheduler().add_noise(clean, noise.x_t, batch.t)
        torch.testing.assert_close(batch.x_t, x_t)
        noises.append(noise.x_t)
    noises = torch.cat(noises)  # 12,800 numbers
    assert abs(float(noises.mean())) < 0.05 and abs(float(noises.std()) - 1) < 0.05


def test_draws_are_reproducible():
    settings = Settings(batch=2, seed=3)
    data = make_data(torch.ones(5, 4, 2, 2), examples=4)
    first, second = (Batches(data, settings, ALPHAS, "cpu") for _ in range(2))
    torch.rand(7)  # the global generator has no say
    other = Batches(data, Settings(batch=2, seed=4), ALPHAS, "cpu")
    differs = False
    for _ in range(10):
        ([one], [same], [different]) = first(), second(), other()
        assert torch.equal(one.x_t, same.x_t) and torch.equal(one.t, same.t)
        assert torch.equal(one.text.context, same.text.context)
        differs = differs or not torch.equal(one.t, different.t)
    assert differs


def test_draws_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    Batches(make_data(torch.ones(5, 4, 2, 2), examples=4), Settings(), ALPHAS, "cpu")()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_example_comes_once_an_epoch(batch):
    draws = Batches(make_data(torch.zeros(1, 4, 2, 2), 5), Settings(batch=batch), ALPHAS, "cpu")
    rows = []
    for _ in range(20):
        [drawn] = draws()
        assert len(drawn.t) == batch
        rows += drawn.text.context[:, 0, 0].tolist()
    epochs = [tuple(rows[i : i + 5]) for i in range(0, len(rows), 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 1  # in another order


def test_concepts_take_turns_whatever_their_number_of_prompts():
    flags = torch.ones(1, 77, dtype=torch.bool)
    owners = [0, 1, 1, 1, 2, 2]
    texts = [Text(torch.full((1, 77, 1), float(i))) for i in range(6)]
    examples = [Example(owner, text, flags) for owner, text in zip(owners, texts)]
    latents = [torch.full((1, 4, 2, 2), 1000.0 * owner) for owner in range(3)]
    draws = Batches(Data(examples, latents), Settings(), torch.full((1000,), 0.999), "cpu")
    drawn = [draws()[0] for _ in range(36)]
    rows = [int(batch.text.context[0, 0, 0]) for batch in drawn]
    concepts = [owners[row] for row in rows]
    assert all(sorted(concepts[i : i + 3]) == [0, 1, 2] for i in range(0, 36, 3))
    assert Counter(rows) == {0: 12, 1: 4, 2: 4, 3: 4, 4: 6, 5: 6}
    # Each with its own concept's reference.
    assert [round(float(batch.x_t.mean()) / 1000) for batch in drawn] == concepts


def test_every_reference_is_drawn():
    latents = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 4, 2, 2) * 1000
    draws = Batches(make_data(latents), Settings(batch=64), torch.full((1000,), 0.999), "cpu")
    seen = Counter((draws()[0].x_t.mean((1, 2, 3)) / 1000).round().tolist())
    assert sorted(seen) == [0, 1, 2, 3] and min(seen.values()) > 5


def test_time_steps_are_uniform():
    draws = Batches(make_data(torch.zeros(1, 4, 1, 1)), Settings(batch=64), ALPHAS, "cpu")
    t = torch.cat([draws()[0].t for _ in range(200)])  # 12,800
    assert t.min() >= 0 and t.max() <= 999
    tenths = torch.bincount(t // 100, minlength=10)
    assert len(tenths) == 10 and tenths.min() > 1100 and tenths.max() < 1460  # 1280 +- 5 sigma


def test_time_steps_reach_both_ends():
    draws = Batches(make_data(torch.zeros(1, 4, 1, 1)), Settings(batch=64), ALPHAS[:5], "cpu")
    assert set(draws()[0].t.tolist()) == {0, 1, 2, 3, 4}
