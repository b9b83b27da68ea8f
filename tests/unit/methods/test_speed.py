"""SPEED's formula in whole matrices, layer by layer, against ours."""

import pytest
import torch

from fmn.concepts.concept import Concept, Prompt
from fmn.errors import ForgetError
from fmn.linalg import extend_basis, kmeans_centres, main_directions, weakest_direction
from fmn.methods import speed

from ..literal import KEYS_AND_VALUES, WIDTH, assert_solves, near, rows, weights
from ..tiny import TinyModel, same_tensors, weights_of
from .test_uce import last

CONCEPTS = [Concept("dog", anchor="cat"), Concept("van gogh", "style")]
KEEP = ("blue house", "tree", "a man on a horse", "boat", "lamp", "river")
IDENTITY = torch.eye(WIDTH, dtype=torch.float64)


def literal(weight, pairs, retained, exact, settings):
    """W' = W + W (A - B) P (I - M K (K^T P M K)^-1 K^T P) M, with columns as in the paper."""
    a = sum(torch.outer(anchor, c) for c, anchor in pairs) / len(pairs)
    b = sum(torch.outer(c, c) for c, _ in pairs) / len(pairs)
    mean = sum(torch.outer(k, k) for k in retained) / len(retained)
    values, vectors = torch.linalg.eigh(mean)
    free = vectors[:, values < settings.threshold]
    p = free @ free.T
    m = torch.inverse(b @ p + settings.retain * IDENTITY)
    inner = IDENTITY
    if len(exact):
        k = torch.stack(list(exact)).T
        inner = inner - m @ k @ torch.inverse(k.T @ p @ m @ k) @ k.T @ p
    return weight + weight @ (a - b) @ p @ inner @ m


def filtered(weight, pairs, kept, copies, generator):
    """Influence-based filter and directed copies, in loops."""
    a = sum(torch.outer(anchor, c) for c, anchor in pairs) / len(pairs)
    b = sum(torch.outer(c, c) for c, _ in pairs) / len(pairs)
    plain = weight @ (a - b) @ torch.inverse(IDENTITY + b)

    def affected(candidates):
        influence = [(plain @ k).square().sum() for k in candidates]
        mean = sum(influence) / len(influence)
        return [k for k, how in zip(candidates, influence) if how >= mean]

    retained = affected(kept)
    direction = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    noise = torch.randn(len(retained), copies, WIDTH, dtype=torch.float64, generator=generator)
    projector = torch.outer(direction, direction)
    noisy = [k + projector @ noise[i, j] for i, k in enumerate(retained) for j in range(copies)]
    return retained + (affected(noisy) if noisy else [])


def prepared(model):
    pairs = [(last(model, each.name), last(model, each.anchor)) for each in CONCEPTS]
    kept = [last(model, text) for text in KEEP]
    empty = model.encode(Prompt("", "")).context[0].double()
    return pairs, kept, [empty[0], *kmeans_centres(empty[1:], 3)]


@pytest.mark.parametrize("layers", ["v", "k", "kv"])
@pytest.mark.parametrize("invariants", [True, False])
def test_without_the_filter(layers, invariants, tmp_path):
    model = TinyModel()
    settings = speed.Settings(
        retain=0.3, filter=False, layers=layers, keep_list="none", invariants=invariants
    )
    before = weights_of(model.unet)
    patch = speed.run(model, CONCEPTS, settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    pairs, kept, exact = prepared(model)
    expected = {
        name: literal(weight, pairs, kept, exact * invariants, settings)
        for name, weight in weights(model).items()
        if name[-1] in layers
    }
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")
    assert patch.ranks == [2]


@pytest.mark.parametrize("copies", [0, 3])
def test_each_layer_has_its_own_filter(copies, tmp_path):
    model = TinyModel()
    settings = speed.Settings(layers="kv", copies=copies, keep_list="none", seed=4, retain=0.05)
    patch = speed.run(model, CONCEPTS, settings, keep=KEEP)
    pairs, kept, exact = prepared(model)
    generator = torch.Generator().manual_seed(4)
    expected, counts = {}, set()
    for layer in KEYS_AND_VALUES:
        weight = weights(model)[layer.name]
        retained = filtered(weight, pairs, kept, copies, generator)
        counts.add(len(retained))
        expected[layer.name] = literal(weight, pairs, retained, exact, settings)
    assert len(counts) > 1 or not copies
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_the_factor_is_exact_and_leaves_what_it_should():
    pairs, exact = speed.Pairs(rows(3, 1), rows(3, 2)), rows(2, 3)
    kept = rows(5, 4)
    problem = speed.Problem(pairs, kept, exact)
    settings = speed.Settings(threshold=0.0, retain=0.2)
    factor = speed.right_factor(problem, kept, main_directions(kept, WIDTH), settings)
    change = (pairs.anchors - pairs.targets).T @ factor
    near(IDENTITY + change, literal(IDENTITY, list(zip(*pairs)), kept, exact, speed.Settings(
        threshold=1e-9, retain=0.2)), 1e-9)  # fmt: skip
    assert float((change @ kept.T).norm()) < 1e-12
    assert float((change @ exact.T).norm()) < 1e-11
    assert float((change @ pairs.targets.T).norm()) > 1


def test_an_invariant_in_the_kept_span_is_no_second_constraint():
    pairs, kept = speed.Pairs(rows(2, 1), rows(2, 2)), rows(5, 4)
    problem = speed.Problem(pairs, kept, kept[:2])
    given = kept, main_directions(kept, WIDTH), speed.Settings(threshold=0.0)
    alone = speed.right_factor(problem._replace(exact=rows(0)), *given)
    near(speed.right_factor(problem, *given), alone, 1e-9)


def test_no_room_is_refused():
    with pytest.raises(ForgetError, match="fill all the room"):
        speed.run(TinyModel(), CONCEPTS, speed.Settings(filter=False))


def test_a_single_kept_word_is_protected():
    model = TinyModel()
    settings = speed.Settings(keep_list="none", copies=0, threshold=0.0)
    patch = speed.run(model, CONCEPTS, settings, keep=("blue house",))
    kept = last(model, "blue house")
    for name, weight in weights(model).items():
        if name in patch.changes:
            moved = patch.change_of(name).double() @ kept
            assert float(moved.norm()) < 1e-5 * float((weight @ kept).norm())


def test_nothing_kept_is_allowed():
    patch = speed.run(TinyModel(), CONCEPTS, speed.Settings(keep_list="none"))
    assert patch.ranks == [2] and patch.info["loss"]["last"] < patch.info["loss"]["first"]


def test_the_weakest_direction_is_the_thin_decompositions():
    for weight in (rows(5, 1), rows(40, 1)):
        expected = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
        assert abs(float(weakest_direction(weight) @ expected)) == pytest.approx(1, abs=1e-10)


def test_a_basis_takes_a_further_vector_once():
    basis = main_directions(rows(3, 1), WIDTH)
    more = extend_basis(basis, rows(1, 2)[0])
    near(more.T @ more, torch.eye(4, dtype=torch.float64), 1e-12)
    assert extend_basis(more, rows(1, 2)[0]).shape == (WIDTH, 4)


def test_centres_of_clear_groups():
    middles = 10 * rows(3, 1)
    points = torch.cat([middle + 0.1 * rows(4, i) for i, middle in enumerate(middles)])
    found = kmeans_centres(points, 3)
    for group in points.split(4):
        assert float(torch.cdist(group.mean(0)[None], found).min()) < 1e-9
    assert len(kmeans_centres(points[:2], 3)) == 2
