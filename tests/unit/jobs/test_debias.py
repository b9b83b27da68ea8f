"""Debiasing in rounds. The judge is scripted: what its answers lead to is what is tested."""

import pytest
import torch

from fmn.concepts.concept import Concept
from fmn.errors import ForgetError
from fmn.jobs.debias import balance
from fmn.methods import uce
from fmn.models.sampling import Sampling

from ..tiny import TinyModel, same_tensors, weights_of

QUICK = {"sampling": Sampling(1, 1.0), "settings": uce.Settings(keep_list="none")}
HALF = {"woman": 0.5, "man": 0.5}


class Scripted:
    """Says "woman" for so many of ten pictures, round after round."""

    labels = {"who": ("man", "woman", "nobody")}

    def __init__(self, *women):
        self.women, self.seen = list(women), []

    def probabilities(self, images, domain):
        count = self.women.pop(0)
        self.seen.append(images)
        rows = [[0.1, 0.2, 0.7]] * count + [[0.2, 0.1, 0.7]] * (len(images) - count)
        return torch.tensor(rows)


def test_weights_grow_by_what_is_missing_until_it_is_there():
    model, judge, told = TinyModel(), Scripted(1, 3, 5), []
    before = weights_of(model.unet)
    patch, done = balance(
        model, Concept("doctor"), HALF, judge, "who", on_round=told.append, **QUICK
    )
    assert [each.shares["woman"] for each in done] == [0.1, 0.3, 0.5] and told == done
    expected = [{"woman": w, "man": -w} for w in (0.0, 0.4, 0.6)]
    for each, weights in zip(done, expected):
        assert each.weights == pytest.approx(weights)
    same = uce.run(
        model, [Concept("doctor")], uce.Settings(keep_list="none", attributes="woman 0.6, man -0.6")
    )
    for name, (up, down) in patch.changes.items():
        torch.testing.assert_close(up @ down, same.changes[name][0] @ same.changes[name][1])
    assert not judge.seen[0].equal(judge.seen[1])  # the patch was worn
    assert same_tensors(before, weights_of(model.unet))


def test_the_best_round_counts_where_it_does_not_settle():
    patch, done = balance(
        TinyModel(), Concept("doctor"), HALF, Scripted(0, 4, 9, 10), "who", rounds=3, **QUICK
    )
    assert len(done) == 4 and "woman 0.500000" in patch.info["settings"]["attributes"]


def test_nothing_to_do():
    patch, done = balance(TinyModel(), Concept("doctor"), HALF, Scripted(5), "who", **QUICK)
    assert patch is None and len(done) == 1


@pytest.mark.parametrize(
    "desired, message",
    [
        ({"woman": 0.5, "robot": 0.5}, "no label.*robot"),
        ({}, "no label"),
        ({"woman": 0.7, "man": 0.7}, "add up to 1.4"),
        ({"woman": 1.5, "man": -0.5}, "none below 0"),
    ],
)
def test_wrong_shares(desired, message):
    with pytest.raises(ForgetError, match=message):
        balance(TinyModel(), Concept("doctor"), desired, Scripted(5), "who", **QUICK)
