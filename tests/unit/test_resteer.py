"""Re-steering's loss and gradient, against the released algorithm written out once more."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from fmn.concept import Concept
from fmn.methods import resteer
from fmn.methods.resteer import Data, Draws, Settings, prepare
from fmn.spans import END

from .tiny import TinyModel, make_scheduler, word_id

MUSK = Concept("elon musk", "identity")
DOG = Concept("dog")
STYLE = Concept("van gogh painting", "style")


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
        if use_pooler and token == END:
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

    def train(parameters, loss_at, *args):
        model.seen.clear()
        loss = loss_at(0)
        caught["seen"] = list(model.seen)
        loss.backward()
        caught["loss"] = loss.detach()
        raise Captured

    original = resteer.make_adapters
    with monkeypatch.context() as patched, pytest.raises(Captured):
        patched.setattr(resteer, "make_adapters", make_adapters)
        patched.setattr(resteer, "train", train)
        resteer.run(model, concepts, settings)
    gradients = {
        f"{name}.{part}": parameter.grad
        for name, adapter in caught["adapters"].items()
        for part, parameter in adapter.named_parameters()
    }
    return caught["loss"], gradients, caught["seen"]


@pytest.mark.parametrize("scope", ["attention", "unet"])
@pytest.mark.parametrize("pad", [END, 0], ids=["sd1-padding", "sd2-padding"])
@pytest.mark.parametrize("use_pooler", [False, True])
def test_equals_the_released_algorithm(monkeypatch, scope, pad, use_pooler):
    model = TinyModel(pad)
    settings = Settings(
        scope=scope, full=True, end_tokens="all" if use_pooler else "none", references="samples",
        samples=1, seed=7,
    )  # fmt: skip
    loss, gradients, seen = first_step(model, [MUSK], settings, monkeypatch)

    (prompt,) = MUSK.training_prompts()
    flagged = released_positions(model, MUSK, use_pooler)
    assert len(flagged) == 2 + use_pooler * (71 if pad == END else 1)
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
    """The noise that a seed draws: what is left of x_t when the reference is black."""
    data = prepare(model, [MUSK], settings)
    black = Data(data.examples, [torch.zeros_like(latents) for latents in data.latents])
    alphas_cumprod = make_scheduler().alphas_cumprod
    (batch,) = Draws(black, settings, alphas_cumprod, "cpu")()
    assert torch.equal(batch.t, t)
    return batch.x_t / (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)


def test_a_batch_is_the_norm_over_its_samples(monkeypatch):
    """Concepts of one, two and three tokens in one batch, which the released code mixes up."""
    concepts = [DOG, MUSK, STYLE]
    model = TinyModel()
    settings = Settings(scope="attention", full=True, batch=3)
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


def test_prompts_of_different_lengths_in_one_batch(monkeypatch):
    long = Concept("dog", "custom", prompts=("word " * 80 + "dog",))
    model = TinyModel()
    loss, _, seen = first_step(model, [MUSK, long], Settings(full=True, batch=2), monkeypatch)
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
        handle = block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        settings = Settings(scope=scope, full=full, checkpointing=checkpointing)
        runs[checkpointing] = first_step(model, [MUSK, DOG], settings, monkeypatch)[:2]
        handle.remove()
        # One look, one forward, and the same again in backward.
        assert len(calls) == 2 + checkpointing
    (loss, gradients), (again, recomputed) = runs[False], runs[True]
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        if full or name.endswith("up"):  # down's gradient is zero while up is
            assert_same_gradient(recomputed[name], gradient)
