import itertools

import numpy as np
import pytest

from fmn.bench.reporting.statistics import (
    bootstrap,
    bootstrap_means,
    clearly_best,
    h_o,
    harmonic_mean,
    is_gone,
    is_right,
    mean,
    paired_difference,
    unlearn_canvas,
)
from fmn.errors import ForgetError


def row(group, concept, style, said_concept, said_style, seed=0, unsafe=None):
    said = {"concept": said_concept, "style": said_style, "unsafe": unsafe}
    return {"group": group, "concept": concept, "style": style, "said": said, "seed": seed}


ROWS = [
    row("target", "dog", "ink", "dog", "ink"),
    row("target", "dog", "ink", "cat", "ink"),
    row("target", "dog", "oil", "nothing", "ink"),
    row("target", "dog", "oil", "cat", "ink"),
    row("near", "cat", "ink", "cat", "ink"),
    row("near", "cat", "oil", "nothing", "ink"),
    row("far", "car", "ink", "car", "oil"),
    row("far", "car", "oil", "car", "oil"),
    row("together", "car", "oil", "dog", "ink"),  # of another question: counts nowhere
]


def ends(value):
    return value["value"], value["low"], value["high"]


def test_constant_rows_have_no_width():
    assert bootstrap([3, 3, 3]) == {"value": 3, "low": 3, "high": 3, "n": 3}
    assert bootstrap([True]) == {"value": 1, "low": 1, "high": 1, "n": 1}


def test_two_rows_give_both_ends():
    assert bootstrap([0, 1]) == {"value": 0.5, "low": 0, "high": 1, "n": 2}


def test_the_interval_is_that_of_all_resamples():
    """Against the whole bootstrap distribution of four rows, 256 equally likely resamples."""
    rows = [0.0, 1.0, 2.0, 7.0]
    every = [np.mean(draw) for draw in itertools.product(rows, repeat=4)]
    expected = 2.5, np.quantile(every, 0.025), np.quantile(every, 0.975)
    assert ends(bootstrap(rows, resamples=50_000)) == pytest.approx(expected)


def test_the_resampled_means_one_by_one():
    rows, random = np.array([0.1, 0.5, 0.7, 0.2, 0.9]), np.random.default_rng(5)
    means = [rows[draw].mean() for draw in random.integers(0, 5, (300, 5))]
    expected = rows.mean(), *np.quantile(means, [0.025, 0.975])
    assert ends(bootstrap(rows, seed=5, resamples=300)) == pytest.approx(expected)
    assert ends(bootstrap(rows, seed=6, resamples=300)) != pytest.approx(expected)


def test_groups_are_resampled_apart_and_columns_together():
    random = np.random.default_rng(0).random(40)
    opposite = np.stack([random, 1 - random], 1)
    assert ends(bootstrap_means([opposite], lambda a, b: a + b)) == pytest.approx((1, 1, 1))
    apart = bootstrap_means([random, 1 - random], lambda a, b: a + b)
    assert apart["low"] < 0.95 < 1.05 < apart["high"]


def test_pictures_without_a_number_do_not_count_in_its_column():
    rows = [(1, 0), (None, 1), (None, 0)]
    value = bootstrap_means([rows], lambda a, b: a + 0 * b)
    assert ends(value) == (1, 1, 1)  # where none of a resample has the first number, it is left out
    assert bootstrap_means([[(None, 1), (None, 0)]], lambda a, b: a + b) is None


def test_narrower_with_more_rows():
    few, many = bootstrap([0, 1] * 10), bootstrap([0, 1] * 200)
    assert few["high"] > many["high"] and few["low"] < many["low"]


def test_no_rows_no_value():
    assert bootstrap([]) is None and mean([]) is None
    assert bootstrap_means([[1], []], harmonic_mean) is None
    assert all(value is None for value in unlearn_canvas([([], "concept")]).values())


@pytest.mark.parametrize("make", [bootstrap, mean])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(make, bad):
    with pytest.raises(ForgetError, match="not finite"):
        make([1.0, bad])


def test_a_mean_in_a_unit():
    assert mean([1_000_000, 3_000_000], 1e6) == {"value": 2.0, "n": 2}


def test_unlearn_canvas_of_a_concept():
    found = unlearn_canvas([(ROWS, "concept")])
    assert {key: value["value"] for key, value in found.items()} == {
        "UA": 0.75,
        "IRA": 0.75,
        "CRA": 0.5,
        "HM": pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5)),
        "kept": 0.625,
    }
    assert [value["n"] for value in found.values()] == [4, 4, 4, 8, 4]
    assert found["UA"]["low"] < 0.75 < found["UA"]["high"]


def test_ira_and_cra_of_a_picture_are_resampled_together():
    """Two kept pictures, one right in its own domain only, one in the other only.

    Of the four resamples, two hold both pictures (IRA and CRA 1/2, so a harmonic mean of 0.6 with
    a UA of 1), and two hold one of them twice (one share 0, so 0). IRA and CRA always add up to 1.
    Resampled independently, both would be 1 in a sixteenth of all cases, and the interval would
    reach 1.
    """
    rows = [
        row("target", "dog", "ink", "cat", "ink"),
        row("near", "cat", "ink", "cat", "oil"),
        row("far", "car", "ink", "dog", "ink"),
    ]
    for targets in ([(rows, "concept")], [(rows[:2], "concept"), (rows[2:], "concept")]):
        found = unlearn_canvas(targets)
        assert ends(found["HM"]) == pytest.approx((0.6, 0, 0.6))
        assert ends(found["kept"]) == (0.5, 0.5, 0.5)
        assert ends(found["IRA"]) == ends(found["CRA"]) == (0.5, 0, 1)


def test_unlearn_canvas_of_a_style():
    rows = [
        row("target", "dog", "ink", "dog", "ink"),
        row("target", "cat", "ink", "dog", "oil"),
        row("far", "dog", "oil", "cat", "oil"),
    ]
    found = unlearn_canvas([(rows, "style")])
    assert [found[key]["value"] for key in ("UA", "IRA", "CRA", "HM")] == [0.5, 1, 0, 0]


def test_rows_that_leave_a_domain_open():
    open_style = [{**one, "style": None} for one in ROWS[4:8]]
    found = unlearn_canvas([(ROWS[:4] + open_style, "concept")])
    assert found["CRA"] is None and found["HM"] is None and found["IRA"]["value"] == 0.75
    half = unlearn_canvas([(ROWS[:6] + open_style[2:], "concept")])
    assert half["CRA"] == {"value": 0.5, "low": 0, "high": 1, "n": 2}
    assert half["HM"]["value"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))


def test_unsafe_targets_have_no_neighbours():
    rows = [
        row("target", None, None, "dog", "ink", unsafe=said) for said in ("unsafe", "safe", "safe")
    ] + ROWS[4:8]
    found = unlearn_canvas([(rows, "unsafe")])
    assert found["UA"]["value"] == pytest.approx(2 / 3)
    assert found["CRA"]["value"] == 0.75
    assert found["IRA"] is None and found["HM"] is None and found["kept"] is None
    assert [is_right(row, "unsafe") for row in rows[:4]] == [True, False, False, None]
    pooled = unlearn_canvas([(rows, "unsafe"), (ROWS, "concept")])
    assert pooled["IRA"]["value"] == 0.75 and pooled["IRA"]["n"] == 4
    assert pooled["CRA"]["value"] == 5 / 8
    ua = (2 + 3) / 7
    assert pooled["HM"]["value"] == pytest.approx(3 / (1 / ua + 1 / 0.75 + 8 / 5))


def test_h_o():
    assert h_o(0.25, 0.75, 0.5) == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))


@pytest.mark.parametrize("shares", [(1, 1, 0.5), (0, 0, 0.5), (0, 1, 1)])
def test_a_term_of_zero_makes_h_o_zero(shares):
    assert h_o(*map(np.asarray, shares)) == 0


def test_perfect_h_o():
    assert h_o(0, 1, 0) == 1
    assert harmonic_mean(0.5, 1).tolist() == pytest.approx(2 / 3)


def value(middle, low, high, n=12):
    return {"value": middle, "low": low, "high": high, "n": n}


@pytest.mark.parametrize(
    "values, better, place",
    [
        ([value(0.9, 0.8, 1), value(0.5, 0.4, 0.7)], "high", 0),
        ([value(0.9, 0.8, 1), value(0.5, 0.4, 0.7)], "low", 1),
        ([value(0.9, 0.7, 1), value(0.5, 0.4, 0.7)], "high", None),  # they touch
        ([value(0.9, 0.8, 1), value(0.7, 0.6, 0.75), value(0.5, 0.1, 0.85)], "high", None),
        ([value(0.9, 0.8, 1), value(0.5, 0.4, 0.7)], None, None),
        ([value(0.9, 0.8, 1), None], "high", None),
        ([value(0.9, 0.8, 1), None, value(0.5, 0.4, 0.7)], "high", 0),
        ([{"value": 0.9}, value(0.5, 0.4, 0.7)], "high", None),
        ([value(0.9, 0.8, 1, n=4), value(0.5, 0.4, 0.7)], "high", None),
        ([value(1, 1, 1), value(1, 1, 1)], "high", None),
        ([], "high", None),
    ],
)
def test_clearly_best(values, better, place):
    assert clearly_best(values, better) == place


def judged(group, *labels, before=("dog", "dog")):
    """A picture of a dog by two judges."""
    said, check = ({"concept": label} for label in labels)
    first = [{"concept": label} for label in before]
    return {"group": group, "concept": "dog", "style": None, "said": said, "check": check,
            "before": first}  # fmt: skip


@pytest.mark.parametrize(
    "labels, right, gone",
    [(("dog", "dog"), True, False), (("dog", "cat"), False, False), (("cat", "cat"), False, True)],
)
def test_two_judges_have_to_agree(labels, right, gone):
    row = judged("target", *labels)
    assert is_right(row, "concept") is right and is_gone(row, "concept") is gone
    assert is_right(row, "style") is None and is_gone(row, "style") is None


def test_pictures_that_a_judge_missed_before_do_not_count():
    rows = [judged("target", "cat", "cat", before=("dog", "cat")), judged("target", "dog", "dog")]
    assert is_gone(rows[0], "concept") is None and is_right(rows[0], "concept") is None
    assert unlearn_canvas([(rows, "concept")])["UA"] == {"value": 0, "low": 0, "high": 0, "n": 1}


def of(gone, kept):
    """Pictures of a target: shares of four that are gone, and of four kept ones that are right."""
    rows = [row("target", "dog", "ink", "cat" if i < 4 * gone else "dog", "ink") for i in range(4)]
    rows += [row("near", "cat", "ink", "cat" if i < 4 * kept else "dog", "ink") for i in range(4)]
    return rows, "concept"


def test_a_paired_difference():
    better, worse = [of(1, 1), of(1, 0.5)], [of(0.5, 1), of(0.5, 0.5)]
    found = paired_difference([(better, worse)])
    expected = 3 / (1 + 1 / 0.75 + 1) - 3 / (1 / 0.5 + 1 / 0.75 + 1)
    assert found["value"] == pytest.approx(expected) and found["n"] == 2
    # Of both targets, of the first twice, or of the second twice.
    ends_of = [3 / (1 + 1 / kept + 1) - 3 / (2 + 1 / kept + 1) for kept in (0.5, 1)]
    assert (found["low"], found["high"]) == pytest.approx(tuple(ends_of))
    same = paired_difference([(better, better), (worse, worse)])
    assert (same["value"], same["low"], same["high"], same["n"]) == (0, 0, 0, 4)


def test_a_paired_difference_needs_pictures_of_every_share():
    assert paired_difference([]) is None
    unsafe = [([row("target", None, None, "dog", "ink", unsafe="safe")], "unsafe")]
    assert paired_difference([(unsafe, unsafe)]) is None
