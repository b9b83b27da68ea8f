"""Text-side probes: which prompts, which rows, and what a one-label judge can say of two things."""

from functools import partial

import pytest
import torch

from fmn.bench.measures.text import _stands_out, misspellings, prompt_levels, prompts_of, together
from fmn.bench.suite import PROBES, Target
from fmn.errors import ForgetError
from fmn.models.families import FAMILIES
from fmn.patches.patch import ForgetPatch

from ..tiny import TINY, random_changes
from ..worlds import GreyJudge, Odd, make_trial

trial_of = partial(make_trial, judge=GreyJudge(), count=12)


class Soft(GreyJudge):
    """Says the same of every picture: p of old man, dog, cat, tree, nothing."""

    def __init__(self, *p):
        self.p = torch.tensor(p)

    def probabilities(self, images, domain):
        if domain == "style":
            return super().probabilities(images, domain)
        return self.p.expand(len(images), -1)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("dog", ("dgo", "doog", "dg")),
        ("otto", ("otot", "ottto", "oto")),  # swapping the two t in the middle changes nothing
        ("ink drawing", ("ink draiwng", "ink drawwing", "ink draing")),
        ("a", ("aa",)),
    ],
)
def test_misspellings(name, made):
    assert misspellings(name) == made == misspellings(name)


@pytest.mark.parametrize("name", ["dog", "Santa Claus", "aaa", "aa", "ab", "x", "jack-o-lantern"])
def test_misspellings_are_never_the_name_nor_each_other(name):
    made = misspellings(name)
    plain = [one.lower() for one in made]
    assert 1 <= len(made) <= 3
    assert name.lower() not in plain and len(set(plain)) == len(made) and all(map(str.strip, made))


def test_misspellings_are_no_other_known_thing():
    assert misspellings("pear")[2] == "par"
    assert misspellings("pear", ["Par", "ear"])[2] == "per"


def test_probes_without_prompts_fall_back_or_are_absent(sampler):
    trial = trial_of(sampler)
    found = {probe: prompts_of(trial, probe) for probe in PROBES}
    assert found["name"] == ("dog",) and found["aliases"] == ("hound",)
    assert found["short"] == ("a dog runs",) and found["paraphrases"] == ("a barking pet",)
    assert found["misspellings"] == ("dgo", "doog", "dg")
    empty = [probe for probe in PROBES if not found[probe]]
    assert empty == ["prefix", "variant", "long", "templates", "languages"]


def test_rows_of_prompt_levels(sampler):
    trial = trial_of(sampler, count=4)
    result = prompt_levels(trial)
    assert result["absent"] == ["prefix", "variant", "long", "templates", "languages"]
    rows = result["rows"]
    assert [row["probe"] for row in rows[::4]] == [
        "name", "short", "aliases", "paraphrases", "misspellings",
    ]  # fmt: skip
    assert [row["prompt"] for row in rows[-4:]] == ["dgo", "doog", "dg", "dgo"]
    assert len({row["seed"] for row in rows}) == len(rows) == 20
    # Nothing is worn, so both models draw the same.
    assert all(row["still"] == row["untouched"] for row in rows)
    ask = trial.ask("dog", 0)
    assert rows[0]["still"] == trial.shows_target(trial.draw([ask]))[0]


def test_prompt_levels_tell_the_patched_from_the_untouched_model(sampler, monkeypatch):
    monkeypatch.setitem(FAMILIES, "tiny", TINY)
    bare = trial_of(sampler, judge=Odd(), count=4)
    asks = [bare.ask("dog", i) for i in range(4)]
    changes = random_changes(TINY, 2, size=3.0)
    with sampler.applying([(ForgetPatch(TINY, changes, {}), 1.0)]):
        trial = trial_of(sampler, judge=Odd(), count=4)
        worn = trial.draw(asks)
        rows = prompt_levels(trial)["rows"][:4]
    before = bare.draw(asks)
    assert trial.shows_target(worn) != trial.shows_target(before)
    assert [row["still"] for row in rows] == trial.shows_target(worn)
    assert [row["untouched"] for row in rows] == trial.shows_target(before)


@pytest.mark.parametrize(
    ("p", "label", "other", "found"),
    [
        ([0.7, 0.25, 0.05], 0, 1, True),
        ([0.7, 0.25, 0.05], 1, 0, False),  # second, but not more than chance
        ([0.6, 0.35, 0.05], 1, 0, True),
        ([0.6, 0.35, 0.05], 1, None, False),
        ([0.1, 0.4, 0.5], 1, 0, False),  # "nothing" is a label as any other
    ],
)
def test_stands_out(p, label, other, found):
    assert _stands_out(torch.tensor(p), label, other) is found


def test_together_looks_for_each_with_the_other_left_out(sampler):
    judge = Soft(0.05, 0.55, 0.05, 0.3, 0.05)  # a dog, and behind it a tree
    result = together(trial_of(sampler, judge=judge, count=2))
    assert not result["absent"] and len(result["rows"]) == 2
    row = result["rows"][0]
    assert row["prompt"] == "a dog and a tree" and row["keeps"] == "tree"
    assert row["still"] and row["kept"] and row["untouched"] and row["untouched_kept"]
    assert (row["rank"], row["rank_kept"]) == (1, 2)
    assert row["p"] == pytest.approx(0.55) and row["p_kept"] == pytest.approx(0.3)
    only_tree = Soft(0.02, 0.02, 0.02, 0.92, 0.02)
    row = together(trial_of(sampler, judge=only_tree, count=1))["rows"][0]
    assert not row["still"] and row["kept"] and row["rank_kept"] == 1


def test_together_for_a_style_leaves_nothing_out(sampler):
    style = Target("light", "style", together=(("a dog in light", "dog"),))
    row = together(trial_of(sampler, style, judge=Soft(0.5, 0.4, 0.1, 0.0, 0.0), count=1))["rows"][
        0
    ]
    assert not row["kept"] and row["rank_kept"] == 2 and "rank" not in row


def test_together_without_prompts_or_with_unknown_names(sampler):
    assert together(trial_of(sampler, "light")) == {"rows": [], "absent": True}
    odd = Target("dog", "object", together=(("a dog and a boat", "boat"),))
    with pytest.raises(ForgetError, match="no label 'boat'"):
        together(trial_of(sampler, odd))
