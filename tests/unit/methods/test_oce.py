"""OCE on the tiny model, against the paper's equations written out with full matrices."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fmn.closed_form.input_edit import key_value_layers
from fmn.closed_form.output_edit import span, truncate_to_tolerance
from fmn.concepts.concept import Concept, Prompt
from fmn.concepts.keep_list import keep_for
from fmn.errors import ForgetError
from fmn.methods import oce
from fmn.models.families import layers_by_name
from fmn.models.token_positions import EOS_ID
from fmn.patches.lora_keys import file_name
from fmn.patches.patch import save_patch
from fmn.patches.task import Task

from ..tiny import TINY, TinyModel, same_tensors, weights_of

DOG, CAR, KING = Concept("dog"), Concept("car"), Concept("old king", "identity")
GUIDED = [Concept("dog", anchor="cat"), Concept("car", anchor="green tree"), KING]
# The tiny model's weights are small: with these weights both terms of M matter.
BALANCED = oce.Settings(erase=12.0, general=1.0, preserve=0.02, damping=0.3)


@pytest.fixture
def model():
    return TinyModel()


def values(model):
    return {
        layer.name: model.unet.get_submodule(layer.name).weight.detach().double()
        for layer in key_value_layers(TINY, "v")
    }


def last_token(model, words):
    """The context of the last word of a text, found by looking for the end of the text."""
    ids = model.tokenize(Prompt(words, words))
    return model.encode(Prompt(words, words)).context[0, ids.index(EOS_ID) - 1].double()


def rotations(model, concepts, settings, keep=()):
    """The paper: R = U V^T of M = -s EE^T (I - GG^T) + p W C W^T + q sum (Wk)(Wk)^T + l W W^T."""
    erased = [last_token(model, name) for concept in concepts for name in concept.subjects]
    guides = [last_token(model, concept.anchor) for concept in concepts if concept.anchor]
    texts = [*keep, *(f"a photo of {word}" for word in keep_for(concepts, (), "auto"))]
    moment, count = torch.zeros(12, 12, dtype=torch.float64), 0
    for text in texts:
        ids = model.tokenize(Prompt(text, text))
        for position in range(ids.index(EOS_ID) + 1):
            c = model.encode(Prompt(text, text)).context[0, position].double()
            moment, count = moment + torch.outer(c, c), count + 1
    kept = [last_token(model, word) for word in keep_for(concepts, keep, settings.keep_list)]
    found = {}
    for name, weight in values(model).items():
        matrix = settings.general * weight @ (moment / count) @ weight.T
        for k in kept:
            matrix += settings.preserve * torch.outer(weight @ k, weight @ k)
        matrix += settings.damping * weight @ weight.T
        basis = torch.linalg.qr(torch.stack([weight @ c for c in erased], 1)).Q
        other = torch.eye(len(weight), dtype=torch.float64)
        if guides:
            guide = torch.linalg.qr(torch.stack([weight @ c for c in guides], 1)).Q
            other -= guide @ guide.T
        matrix -= settings.erase * basis @ basis.T @ other
        u, _, vh = torch.linalg.svd(matrix)
        found[name] = u @ vh
    return found


def assert_changes(model, patch, expected, tolerance=1e-6):
    """Each layer's change is the expected one, up to a relative error."""
    assert patch.changes.keys() == expected.keys() == values(model).keys()
    for name, change in expected.items():
        up, down = (factor.double() for factor in patch.changes[name])
        assert (up @ down - change).norm() <= tolerance * change.norm() + 1e-12, name


def expected_changes(model, found):
    return {name: found[name] @ weight - weight for name, weight in values(model).items()}


@pytest.mark.parametrize("concepts", [[DOG], [DOG, CAR], [DOG, CAR, KING]])
@pytest.mark.parametrize("settings", [oce.Settings(), oce.PRESETS["oce-style"], BALANCED])
def test_without_a_guide_it_is_the_paper_as_an_exact_low_rank(model, concepts, settings):
    patch = oce.run(model, concepts, settings)
    assert_changes(model, patch, expected_changes(model, rotations(model, concepts, settings)))
    assert max(patch.ranks) <= len(concepts)
    assert patch.info["truncation_error"] < 1e-9


def test_with_a_guide_it_is_the_paper_but_for_a_cut_of_one_percent(model):
    expected = expected_changes(model, rotations(model, GUIDED, BALANCED))
    patch = oce.run(model, GUIDED, BALANCED)
    assert_changes(model, patch, expected, patch.info["truncation_error"] + 1e-6)
    assert patch.info["truncation_error"] <= 0.01
    assert max(patch.ranks) > len(GUIDED)


def test_a_rank_cuts_and_the_error_is_told(model):
    expected = expected_changes(model, rotations(model, GUIDED, BALANCED))
    patch = oce.run(model, GUIDED, replace(BALANCED, rank=2))
    assert patch.ranks == [2]
    worst = 0.0
    for name, change in expected.items():
        up, down = (factor.double() for factor in patch.changes[name])
        tail = torch.linalg.svdvals(change)[2:].norm() / change.norm()
        worst = max(worst, float(tail))
        assert (up @ down - change).norm() / change.norm() == pytest.approx(float(tail), rel=1e-3)
    assert patch.info["truncation_error"] == pytest.approx(worst, rel=1e-6)


@pytest.mark.parametrize("concepts", [[DOG], [DOG, CAR, KING]])
def test_no_channel_is_negated_where_the_determinant_is_negative(model, concepts):
    """An odd number of reflections has det -1; the released code then negates R's last column."""
    patch = oce.run(model, concepts)
    negative = 0
    for name, rotation in rotations(model, concepts, oce.Settings()).items():
        weight, (up, down) = values(model)[name], patch.changes[name]
        if len(weight) > 12:  # R is arbitrary where W gives nothing, and so is its determinant
            continue
        negative += bool(torch.det(rotation) < 0)
        flipped = rotation.clone()
        flipped[:, -1] *= -1
        released = flipped @ weight - weight
        assert torch.linalg.matrix_rank(released, rtol=1e-6) == len(concepts) + 1
        unrelated = torch.linalg.svd(up.double(), full_matrices=True).U[:, len(concepts) :]
        ours = unrelated.T @ (up.double() @ down.double())
        assert ours.norm() < 1e-5 * weight.norm() < (unrelated.T @ released).norm()
    assert negative == 3


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_reflection_is_exact(model, strength):
    settings = replace(oce.PRESETS["oce-reflection"], strength=strength)
    patch = oce.run(model, [DOG, CAR, KING], settings)
    expected = {}
    for name, weight in values(model).items():
        columns = [weight @ last_token(model, word) for word in ("dog", "car", "old king")]
        basis = torch.linalg.qr(torch.stack(columns, 1)).Q
        expected[name] = -strength * basis @ basis.T @ weight
    assert_changes(model, patch, expected)
    assert patch.ranks == [3]
    assert patch.info["loss"] == {"first": 1.0, "last": patch.info["loss"]["last"], "steps": 2}
    after = {0.5: 1.0, 1.0: 0.0, 2.0: -1.0}[strength]
    assert patch.info["loss"]["last"] == pytest.approx(after, abs=1e-6)


def test_after_a_projection_no_text_at_all_gives_the_concept(model):
    patch = oce.run(model, [DOG], oce.PRESETS["oce-projection"])
    texts = torch.randn(50, 12, dtype=torch.float64)
    for name, weight in values(model).items():
        up, down = (factor.double() for factor in patch.changes[name])
        given = (weight + up @ down) @ texts.T
        direction = weight @ last_token(model, "dog")
        assert (direction / direction.norm() @ given).abs().max() < 1e-5 * given.norm()


def test_the_order_of_concepts_and_names_does_not_count(model):
    for settings in (BALANCED, oce.PRESETS["oce-reflection"]):
        first = oce.run(model, GUIDED, settings)
        second = oce.run(model, GUIDED[::-1], settings)
        for name in first.changes:
            assert torch.allclose(first.change_of(name), second.change_of(name), atol=1e-5)


def test_a_name_given_twice_counts_once(model):
    """A QR basis would add a direction that means nothing."""
    once = oce.run(model, [DOG])
    twice = oce.run(model, [Concept("dog", aliases=("dog",)), DOG])
    assert twice.ranks == [1]
    for name in once.changes:
        assert torch.allclose(once.change_of(name), twice.change_of(name), atol=1e-6)


def test_equal_guides_count_once(model):
    concepts = [Concept("dog", anchor="tree"), Concept("car", anchor="tree")]
    single = [Concept("dog", anchor="tree"), Concept("car")]
    first, second = (oce.run(model, each, BALANCED) for each in (concepts, single))
    for name in first.changes:
        assert torch.allclose(first.change_of(name), second.change_of(name), atol=1e-3)


def test_the_start_of_the_text_as_guide(model):
    """As in the released code, whose empty guide ' ' has the start token for its last one."""
    patch = oce.run(model, [DOG], replace(BALANCED, guide="start"))
    start = model.encode(Prompt("", "")).context[0, 0].double()
    moment = oce._moment(Task(model, [DOG], BALANCED))
    for name, weight in values(model).items():
        dog, guide = (span((weight @ c)[:, None]) for c in (last_token(model, "dog"), start))
        up, down = oce.procrustes(weight, dog, guide, moment, BALANCED.erase)
        change = patch.change_of(name).double()
        assert (change - up @ down).norm() <= 0.0101 * change.norm()


def test_expanding_adds_the_released_templates(model):
    patch = oce.run(model, [DOG], replace(oce.PRESETS["oce-reflection"], expand=True))
    name, weight = next(iter(values(model).items()))
    texts = ["dog", "image of dog", "photo of dog", "portrait of dog", "picture of dog"]
    columns = [weight @ last_token(model, text) for text in [*texts, "painting of dog"]]
    # Here five of the texts end at the same place with the same word: one direction.
    assert patch.changes[name][0].shape[1] == torch.linalg.matrix_rank(torch.stack(columns, 1)) == 2
    basis = torch.linalg.qr(torch.stack(columns[:2], 1)).Q
    expected = -2 * basis @ basis.T @ weight
    assert torch.allclose(patch.change_of(name).double(), expected, atol=1e-6)


def test_what_is_kept_changes_less(model):
    def moved(settings, keep=()):
        patch = oce.run(model, [DOG], settings, keep=keep)
        wolf = last_token(model, "wolf")
        return sum(float((patch.change_of(name).double() @ wolf).norm()) for name in patch.changes)

    settings = replace(BALANCED, preserve=0.0, keep_list="none")
    free = moved(settings)
    assert moved(replace(settings, preserve=1.0), ("wolf",)) < 0.5 * free
    # Without a weight of its own, a kept word is a part of text in general.
    assert moved(settings, ("wolf",)) != free


def test_the_file_is_a_plain_lora(model, tmp_path):
    patch = oce.run(model, [DOG, CAR, KING])
    tensors = load_file(save_patch(patch, tmp_path / "dog.safetensors"))
    found = rotations(model, [DOG, CAR, KING], oce.Settings())
    for name, weight in values(model).items():
        prefix = file_name(TINY, layers_by_name(TINY)[name])
        down, up = (
            tensors[f"{prefix}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight")
        )
        edited = weight + up @ down
        assert (edited - found[name] @ weight).norm() < 2e-3 * weight.norm()


def test_the_model_stays_as_it_was(model):
    before = weights_of(model.unet)
    for preset in oce.PRESETS.values():
        oce.run(model, [DOG], preset)
    assert same_tensors(before, weights_of(model.unet))


def test_it_tells_how_far_it_is_and_can_be_cancelled(model):
    steps = []
    patch = oce.run(model, [DOG], on_step=steps.append)
    assert [step.index for step in steps] == list(range(1, len(values(model)) + 1))
    assert {step.total for step in steps} == {len(values(model))}
    mean = sum(steps[-1].losses) / len(steps)
    assert patch.info["loss"] == {"first": 1.0, "last": pytest.approx(mean), "steps": 2}

    def cancel(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oce.run(model, [DOG], on_step=cancel)


def test_refusals(model):
    with pytest.raises(ForgetError, match="forgotten, 0.001, is too small against what is kept"):
        oce.run(model, [DOG], replace(BALANCED, erase=0.001))
    many = [Concept(f"word{i}") for i in range(8)]
    with pytest.raises(ForgetError, match=r"as many directions .* outputs \(8\): forget fewer"):
        oce.run(model, many)
    with pytest.raises(ForgetError, match="'dog' is both to be kept and to be forgotten"):
        oce.run(model, [DOG], keep=("dog",))
    with pytest.raises(ForgetError, match="guide is 'cat': choose one of anchor, start"):
        oce.Settings(guide="cat")


def test_cut():
    up, down = torch.randn(9, 3).double(), torch.randn(3, 7).double()
    for rank, expected in ((0, 3), (2, 2), (5, 3)):
        a, b, error = truncate_to_tolerance(up, down, rank)
        assert a.shape == (9, expected) and b.shape == (expected, 7)
        true = float((a @ b - up @ down).norm() / (up @ down).norm())
        assert error == pytest.approx(true, abs=1e-12)
    loose = truncate_to_tolerance(
        up, torch.diag(torch.tensor([1.0, 1e-3, 1e-3]).double()) @ down, 0, 0.1
    )
    assert loose[0].shape[1] == 1 and 0 < loose[2] <= 0.1
    empty = truncate_to_tolerance(up[:, :0], down[:0])
    assert empty[0].shape == (9, 1) and empty[1].shape == (1, 7)
    assert not (empty[0] @ empty[1]).any() and empty[2] == 0.0
    nothing = truncate_to_tolerance(0 * up, down)
    assert nothing[0].shape == (9, 1) and nothing[2] == 0.0 and not (nothing[0] @ nothing[1]).any()


def test_span():
    columns = torch.tensor([[3.0, 6.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    basis = span(columns.double())
    assert torch.allclose(basis @ basis.mT, torch.diag(torch.tensor([1.0, 1.0, 0.0]).double()))
    assert span(torch.zeros(3, 2)).shape == (3, 0)
