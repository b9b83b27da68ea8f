"""The frozen lora_down of SuPLoRA: which directions it takes, and that kept contexts stay."""

from types import SimpleNamespace

import pytest
import torch

from fmn.closed_form import protected_subspace
from fmn.closed_form.protected_subspace import (
    concept_moment,
    position_weights,
    protected_down,
    protected_downs,
    weighted_moment,
)
from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.methods import esd
from fmn.models.token_positions import CHUNK, EOS_ID
from fmn.patches.task import Task

from ..tiny import BOS, TINY, TinyModel, same_tensors, sections, weights_of, word_id

DOG = Concept("dog")
SETTINGS = esd.Settings(steps=6, lr=0.05, layers="x-strict", protect=True, sampling_steps=2)


def moment(*weighted):
    """Sum of w e e^T over pairs of an axis and its weight."""
    total = torch.zeros(5, 5, dtype=torch.float64)
    for axis, weight in weighted:
        total[axis, axis] = weight
    return total


def test_directions_of_the_concept_off_the_kept_span():
    concept, kept = moment((0, 9), (1, 4), (2, 3), (3, 2), (4, 1)), moment((0, 5), (2, 5))
    axes = torch.eye(5, dtype=torch.float64)
    for rank, expected in ((1, [1]), (2, [1, 3]), (8, [1, 3, 4])):
        torch.testing.assert_close(protected_down(concept, kept, rank).abs(), axes[expected])


def test_mixed_directions():
    """A kept context between two axes leaves only what is at a right angle to it."""
    row = torch.tensor([[1.0, 1, 0, 0, 0]], dtype=torch.float64)
    down = protected_down(moment((0, 1)), row.mT @ row, 4)
    torch.testing.assert_close(down.abs(), torch.tensor([[1.0, 1, 0, 0, 0]]).double() / 2**0.5)
    assert abs(float(down @ row.mT)) < 1e-12


@pytest.mark.parametrize("weak, free", [(0.99, True), (1.02, False)])
def test_only_that_share_of_the_kept_energy_is_given_up(weak, free):
    kept = moment((0, 99), (1, weak))
    down = protected_down(moment((1, 7), (2, 1)), kept, 1)
    assert down.abs().argmax() == (1 if free else 2)
    assert float((down @ kept @ down.mT).sum()) <= 0.01 * kept.trace()


def test_everything_is_kept_out_with_an_energy_of_one():
    kept = moment((0, 1e6), (1, 1))
    down = protected_down(moment((0, 1), (1, 1), (2, 1)), kept, 4, energy=1.0)
    torch.testing.assert_close(down.abs(), torch.eye(5, dtype=torch.float64)[[2]])


@pytest.mark.parametrize(
    "kept", [moment((0, 1), (1, 1)), moment(*((axis, 1) for axis in range(5)))]
)
def test_a_concept_within_what_is_kept(kept):
    with pytest.raises(ForgetError, match="Nothing of the concept lies outside"):
        protected_down(moment((0, 3), (1, 2)), kept, 4)


def test_padding_counts_as_one_position():
    weights = position_weights(sections([7, 8]))
    assert weights[:4].tolist() == [1, 1, 1, 1]  # BOS, two words, EOT
    assert torch.equal(weights[4:], torch.full((73,), 1 / 73, dtype=torch.float64))
    two = position_weights(sections([7] * 77, pad=0))
    assert two[:CHUNK].tolist() == [1] * CHUNK  # full: BOS, 75 words, EOT
    assert two[CHUNK:].sum() == pytest.approx(5) and two[CHUNK + 4] == 1 / 73


def literal_moment(context, ids, start=0):
    total = torch.zeros(12, 12, dtype=torch.float64)
    end = ids.index(EOS_ID)
    for position in range(start, CHUNK):
        c = context[position].double()
        weight = 1 if position <= end else 1 / (CHUNK - 1 - end)
        total += weight * torch.outer(c, c)
    return total


def test_weighted_moment(monkeypatch):
    monkeypatch.setattr(protected_subspace, "AT_ONCE", 2)
    model, texts = TinyModel(), ("", "a cat", "house")
    expected = sum(
        literal_moment(model.encode(prompt).context[0], model.tokenize(prompt))
        for prompt in (Prompt(text, text) for text in texts)
    )
    torch.testing.assert_close(weighted_moment(model, texts), expected)


def test_concept_moment_begins_at_the_concept():
    model, concept = TinyModel(), Concept("dog", aliases=("big puppy",))
    expected = 0
    for prompt in concept.training_prompts():  # "a photo of ...": the concept is word 4
        ids = model.tokenize(prompt)
        assert ids[:4] == [BOS, *map(word_id, ("a", "photo", "of"))]
        expected += literal_moment(model.encode(prompt).context[0], ids, start=4)
    torch.testing.assert_close(concept_moment(model, [concept]), expected)


@pytest.mark.parametrize(
    "changes", [{"layers": "x"}, {"layers": "u"}, {"layers": "all"}, {"full_weights": True}]
)
def test_protection_needs_low_rank_keys_and_values(changes):
    settings = esd.Settings(**{"layers": "x-strict", "protect": True} | changes)
    with pytest.raises(ForgetError, match="low-rank keys and values alone"):
        esd.run(TinyModel(), [DOG], settings)


def test_no_protection():
    assert protected_downs(Task(TinyModel(), [DOG], esd.Settings(), keep=()), "unet") is None
    without = SimpleNamespace(protect=False, rank=4)
    assert protected_downs(Task(TinyModel(), [DOG], without, keep=()), "kv") is None


def orderly_model():
    """Each known word has an axis of its own, whatever its position; other words have nothing."""
    model = TinyModel()
    model.position.zero_()
    model.embedding.zero_()
    ids = [BOS, EOS_ID, *map(word_id, ("a", "photo", "of", "cat", "dog"))]
    model.embedding[ids] = 3 * torch.eye(len(ids), 12)
    model.embedding[word_id("dog")] = 2 * model.embedding[word_id("cat")]
    model.embedding[word_id("dog"), 6:] = 3.0
    return model


def test_kept_prompts_are_untouched_by_construction():
    """The very weights change nothing for kept words, and the U-Net's output stays."""
    model = orderly_model()
    before, losses = weights_of(model.unet), []
    patch = esd.run(model, [DOG], SETTINGS, lambda step: losses.append(step.losses[-1]), ("cat",))
    assert same_tensors(weights_of(model.unet), before)
    assert sum(losses[-3:]) < sum(losses[:3])

    kept, dog = model.encode_all(["", "cat"]).flatten(0, 1), model.embedding[word_id("dog")]
    downs = [down for _, down in patch.changes.values()]
    assert len(downs) == 14 and all(torch.equal(down, downs[0]) for down in downs)
    # All that is left of the dog is its direction off the cat's.
    expected = torch.zeros(12)
    expected[6:] = 6**-0.5
    torch.testing.assert_close(downs[0].abs()[0], expected)
    for name in patch.changes:
        change = patch.change_of(name)
        assert (dog @ change.mT).abs().max() > 0.01
        assert (kept @ change.mT).abs().max() <= 1e-5 * (dog @ change.mT).abs().max()

    def output(unet, text):
        x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        context = model.encode(Prompt(text, text)).context
        return unet(x_t, torch.tensor([500]), context).sample.detach()

    other = TinyModel()
    with torch.no_grad():
        for name in patch.changes:
            other.unet.get_submodule(name).weight += patch.change_of(name)
    for text in ("", "cat", "cat cat"):
        torch.testing.assert_close(output(other.unet, text), output(model.unet, text))
    assert (output(other.unet, "dog") - output(model.unet, "dog")).abs().max() > 0.01


def test_the_users_own_words_do_not_drown_in_the_list():
    """ "cat" is one of hundreds of entries, and kept only if it is asked for."""
    model = orderly_model()
    axis = word_id("cat")

    def share_of_cat(keep):
        down = protected_downs(Task(model, [DOG], SETTINGS, keep=keep), "kv")
        first = next(iter(down.values()))
        return float((first @ model.embedding[axis]).norm() / model.embedding[axis].norm())

    assert share_of_cat(("cat",)) < 1e-6 < 0.1 < share_of_cat(())


def test_shapes_and_layers():
    model = orderly_model()
    downs = protected_downs(Task(model, [DOG], SETTINGS, keep=("cat",)), "kv")
    assert len(downs) == 14
    assert {down.shape[1] for down in downs.values()} == {TINY.context_dim}
    assert {down.dtype for down in downs.values()} == {torch.float32}
