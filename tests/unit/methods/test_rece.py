"""RECE with whole matrices, layer by layer, against ours."""

import pytest
import torch

from fmn.concepts.concept import Prompt
from fmn.methods import rece, uce

from ..literal import WIDTH, assert_solves, literal_uce, near, rows, weights
from ..tiny import TinyModel, same_tensors, weights_of
from .test_uce import CONCEPTS, KEEP, last


def context(model, text):
    return model.encode(Prompt(text, text)).context[0].double()


def literal(model, c, anchors, kept, settings):
    """W of every layer after UCE and all rounds."""
    original = weights(model)
    weighted = settings.erase, settings.preserve, settings.damping
    current = {
        name: literal_uce(w, c, [w @ a for a in anchors], kept, *weighted)
        for name, w in original.items()
    }
    for _ in range(settings.rounds):
        left = settings.regularisation * torch.eye(WIDTH, dtype=torch.float64)
        right = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for name, w in current.items():
            left = left + w.T @ w
            right = right + w.T @ original[name]
        hardest = [torch.inverse(left) @ right @ each for each in c]
        current = {
            name: literal_uce(w, hardest, [w @ a for a in anchors], kept, *weighted)
            for name, w in current.items()
        }
    return current


@pytest.mark.parametrize(
    "settings",
    [
        rece.Settings(keep_list="none", rank=0),
        rece.Settings(rounds=3, regularisation=1e-2, keep_list="none", rank=0),
        rece.Settings(erase=2.0, preserve=0.5, damping=1.0, keep_list="none", rank=0),
    ],
)
def test_rounds_are_those_of_whole_matrices(settings, tmp_path):
    model = TinyModel()
    before = weights_of(model.unet)
    patch = rece.run(model, CONCEPTS, settings, keep=KEEP)
    assert same_tensors(weights_of(model.unet), before)
    names = [(name, each.anchor) for each in CONCEPTS for name in each.subjects]
    c, anchors = zip(*[(last(model, name), last(model, anchor)) for name, anchor in names])
    kept = [*(last(model, text) for text in KEEP), *context(model, "")]
    expected = literal(model, c, anchors, kept, settings)
    assert_solves(patch, model, expected, tmp_path / "patch.safetensors")


def test_the_edit_itself_is_exact():
    model, settings = TinyModel(), rece.Settings(rounds=2)
    pairs = uce.Pairs(rows(3, 1), rows(3, 2))
    kept, total = rows(4, 3), sum(w.T @ w for w in weights(model).values())
    edit = rece.rece(total, pairs, kept, settings)
    assert edit.left.shape[1] == 3 * (1 + 2)
    for name, expected in literal(model, *pairs, kept, settings).items():
        weight = weights(model)[name]
        near(weight + weight @ edit.left @ edit.right, expected, 1e-9)


def test_a_round_undoes_what_the_hardest_embedding_brought_back():
    """Seen through all layers: c' gives what c gave after UCE, and the anchor's after a round."""
    model = TinyModel()
    pairs = uce.Pairs(rows(1, 1), rows(1, 2))
    kept = rows(2, 3)
    total = sum(w.T @ w for w in weights(model).values())
    settings = rece.Settings(rounds=1, regularisation=1e-6, damping=1e-3)
    first = uce.uce(*pairs, kept, 1.0, 0.1, 1e-3)
    change = torch.eye(WIDTH, dtype=torch.float64) + first.left @ first.right
    hardest = rece.hardest_contexts(change.T @ total @ change, change.T @ total, rows(1, 1), 1e-6)

    def applied(edit, contexts):
        """(I + left right) c, what W' sees as its input."""
        return contexts + contexts @ edit.right.mT @ edit.left.mT

    def distance(edit, other):
        off = applied(edit, hardest) - other
        return float((off @ total * off).sum())

    after = rece.rece(total, pairs, kept, settings)
    assert distance(first, pairs.targets) < 1e-3 * distance(first, pairs.anchors)
    assert distance(after, applied(first, pairs.anchors)) < 1e-3 * distance(after, pairs.targets)


def test_the_default_rank_is_for_each_concept():
    model = TinyModel()
    assert rece.run(model, CONCEPTS[:1], rece.Settings(rounds=3, rank=2)).ranks == [2]
    assert rece.run(model, CONCEPTS[:2], rece.Settings(rounds=3, rank=2)).ranks == [4]
