"""Exact low ranks against whole matrices."""

from dataclasses import replace

import pytest
import torch

from fmn.closed_form.input_edit import (
    Distances,
    InputEdit,
    compact,
    debiased_anchors,
    key_value_layers,
    uce,
    weight_gram,
)
from fmn.closed_form.text_embeddings import Pairs
from fmn.concepts.concept import Concept
from fmn.linalg import truncate_product  # fmt: skip
from fmn.methods import double_projections, rece, speed, trce
from fmn.methods import uce as uce_method
from fmn.methods.shared_settings import solved_rank
from fmn.models.families import SD1, layers
from fmn.patches.file_check import MAX_RANK
from fmn.patches.task import Task

from ..literal import WIDTH, literal_uce, near, rows, weights
from ..tiny import TINY, TinyModel

C, ANCHORS, KEPT = rows(3, 1), rows(3, 2), rows(5, 3)
NONE = InputEdit(rows(0).T, rows(0))


def whole(edit):
    return torch.eye(WIDTH, dtype=torch.float64) + edit.left @ edit.right


@pytest.mark.parametrize("weighted", [(1.0, 1.0, 0.5), (3.0, 0.1, 0.01)])
def test_uce_is_equation_7_in_every_layer(weighted):
    edit = uce(C, ANCHORS, KEPT, *weighted)
    assert edit.left.shape == (WIDTH, 3) and edit.right.shape == (3, WIDTH)
    for weight in weights(TinyModel()).values():
        expected = literal_uce(weight, C, ANCHORS @ weight.T, KEPT, *weighted)
        near(weight @ whole(edit), expected, 1e-12)


def test_debias_adds_weighted_attributes_to_the_values():
    attributes, ratios = rows(2, 4), (0.3, -0.2)
    anchors = debiased_anchors(C, attributes, ratios)
    edit = uce(C, anchors, KEPT, 2.0, 0.5, 0.1)
    for weight in weights(TinyModel()).values():
        values = [weight @ c + sum(r * (weight @ a) for r, a in zip(ratios, attributes)) for c in C]
        near(weight @ whole(edit), literal_uce(weight, C, values, KEPT, 2.0, 0.5, 0.1), 1e-12)
    near(anchors, C + 0.3 * attributes[0] - 0.2 * attributes[1], 1e-12)


def test_an_edit_of_the_edited_matrix_is_the_product():
    first, second = uce(C, ANCHORS, KEPT), uce(rows(2, 5), rows(2, 6), KEPT)
    both = first.then(second)
    assert both.left.shape == (WIDTH, 5)
    near(whole(both), whole(first) @ whole(second), 1e-13)
    near(whole(NONE.then(first)), whole(first), 1e-15)


def test_compact_drops_what_adds_no_direction():
    twice = uce(torch.cat([C, C]), torch.cat([ANCHORS, ANCHORS]), KEPT)
    assert twice.left.shape[1] == 6
    few = compact(twice)
    assert few.left.shape == (WIDTH, 3)
    near(few.left @ few.right, twice.left @ twice.right, 1e-11)
    many = InputEdit(rows(50, 7).T, rows(50, 8))
    assert compact(many).left.shape == (WIDTH, WIDTH)
    near(compact(many).left @ compact(many).right, many.left @ many.right, 1e-12)
    nothing = compact(uce(C, C, KEPT))
    assert nothing.left.shape == (WIDTH, 1) and not (nothing.left @ nothing.right).any()


def test_cut_is_the_truncated_svd():
    up, down = rows(9, 1, 40).T, rows(9, 2)
    u, s, vh = torch.linalg.svd(up @ down)
    for rank in (1, 4):
        first, second, lost = truncate_product(up, down, rank)
        assert first.shape == (40, rank) and second.shape == (rank, WIDTH)
        near(first @ second, u[:, :rank] * s[:rank] @ vh[:rank], 1e-12)
        assert lost == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)
    first, _, lost = truncate_product(up, down, 9)
    assert first is up and lost == 0


@pytest.mark.parametrize("outputs", [4, 40])  # fewer and more than inputs
def test_a_cut_to_all_that_a_layer_can_have_loses_nothing(outputs):
    up, down = rows(50, 1, outputs).T, rows(50, 2) * 1e-6
    rank = min(outputs, WIDTH)
    first, second, lost = truncate_product(up, down, 50)
    assert first.shape == (outputs, rank) and second.shape == (rank, WIDTH) and lost == 0
    near(first @ second, up @ down, 1e-20)
    sizes = [float(part.norm()) for part in (first, second)]
    assert max(sizes) < 2 * min(sizes)  # neither is too small for half precision


@pytest.mark.parametrize("columns", [0, 2, WIDTH, 3 * WIDTH])
@pytest.mark.parametrize("rank", [1, WIDTH])
def test_distances_need_no_context(columns, rank):
    """Of contexts that an edit has to do with (``columns`` is 0), in part, and not at all."""
    edit = uce(C, ANCHORS, KEPT)
    pairs = Pairs(C, ANCHORS)
    if columns:
        edit = InputEdit(rows(columns, 7).T, rows(columns, 8))
        pairs = Pairs(torch.cat([C, rows(3, 9)]), torch.cat([ANCHORS, rows(3, 10)]))
    weight = rows(5, 11)
    distances = Distances(pairs, edit.left)
    up, down, (lost, whole, before, after) = distances.change(weight, edit.right, rank)
    change = weight @ edit.left @ edit.right
    assert lost == pytest.approx(float((up @ down - change).square().sum()), rel=1e-9, abs=1e-18)
    assert whole == pytest.approx(float(change.square().sum()), rel=1e-9)
    off = (pairs.targets - pairs.anchors) @ weight.T
    assert before == pytest.approx(float(off.square().sum()), rel=1e-9)
    left = off + pairs.targets @ (up @ down).T
    assert after == pytest.approx(float(left.square().sum()), rel=1e-9)


def test_distances_of_an_edit_that_is_none():
    none = compact(NONE)
    _, _, sums = Distances(Pairs(C, ANCHORS), none.left).change(rows(5, 11), none.right, 9)
    assert sums[:2] == [0, 0] and sums[2] == pytest.approx(sums[3], rel=1e-12)


def test_the_gram_is_the_sum_over_keys_and_values():
    model = TinyModel()
    with model.borrow_denoiser() as denoiser:
        found = weight_gram(denoiser, TINY)
    near(found, sum(weight.T @ weight for weight in weights(model).values()), 1e-12)


def test_keys_and_values_apart():
    every = [layer.name for layer in layers(SD1) if layer.is_key_or_value]
    apart = [layer.name for which in "kv" for layer in key_value_layers(SD1, which)]
    assert len(every) == 32 and sorted(apart) == sorted(every)
    assert [layer.name for layer in key_value_layers(SD1)] == every
    assert all(name.endswith(".to_v") for name in apart[16:])


CONCEPTS = [Concept("red dog"), Concept("cat", anchor="house")]


def test_what_is_lost_to_the_rank_is_reported():
    model = TinyModel()
    settings = uce_method.Settings(tokens="subject", keep_list="none", rank=1)
    exact = uce_method.run(model, CONCEPTS, uce_method.Settings(tokens="subject", keep_list="none"))
    patch = uce_method.run(model, CONCEPTS, settings)  # rank 1 for each of two concepts
    assert exact.ranks == [3] and exact.info["truncation_error"] == 0 and patch.ranks == [2]
    lost = total = 0.0
    for name in exact.changes:
        change = exact.change_of(name).double()
        best = torch.linalg.svdvals(change)[2:].square().sum()
        found = (patch.change_of(name).double() - change).square().sum()
        assert float(found) == pytest.approx(float(best), rel=1e-4)  # Eckart-Young a layer
        lost, total = lost + float(found), total + float(change.square().sum())
    assert patch.info["truncation_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("tokens", ["last", "all"])  # fewer and more pairs than 2 D
def test_losses_are_distances_of_keys_and_values(tokens):
    model = TinyModel()
    settings = uce_method.Settings(tokens=tokens, rank=1)
    steps = []
    patch = uce_method.run(model, CONCEPTS, settings, steps.append, keep=("a blue house",))
    pairs, _ = uce_method.uce_rows(Task(model, CONCEPTS, settings))
    before = after = 0.0
    for name, weight in weights(model).items():
        changed = weight + patch.change_of(name).double()
        before += float((pairs.targets @ weight.T - pairs.anchors @ weight.T).square().sum())
        after += float((pairs.targets @ changed.T - pairs.anchors @ weight.T).square().sum())
    assert patch.info["loss"]["first"] == pytest.approx(before, rel=1e-9)
    assert patch.info["loss"]["last"] == pytest.approx(after, rel=1e-5)
    assert [step.index for step in steps] == list(range(1, len(weights(model)) + 1))
    assert steps[-1].losses == [1, pytest.approx(after / before, rel=1e-5)]


def test_pairs_join():
    both = Pairs.cat([Pairs(C, ANCHORS), Pairs(KEPT, KEPT)])
    assert both.targets.equal(torch.cat([C, KEPT])) and both.anchors.equal(
        torch.cat([ANCHORS, KEPT])
    )


@pytest.mark.parametrize("module", [uce_method, rece, speed, double_projections, trce])
def test_one_concept_of_stable_diffusion_1_takes_at_most_a_megabyte(module):
    """By shapes: what the defaults make of one concept without other names."""
    # The tiny model is too narrow for the shipped lists, and for the ranks of the large one.
    settings = replace(next(iter(module.PRESETS.values())), keep_list="none")
    rank = settings.rank or max(module.run(TinyModel(), [Concept("dog")], settings).ranks)
    assert rank < WIDTH
    chosen = [layer for layer in layers(SD1) if layer.is_key_or_value]
    assert sum(2 * rank * sum(layer.shape) for layer in chosen) <= 1_000_000


def test_rank_is_checked_like_any_setting():
    assert solved_rank().metadata["high"] == MAX_RANK
