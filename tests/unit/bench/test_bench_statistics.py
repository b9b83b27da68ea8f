import itertools

import numpy as np
import pytest

from fmn.bench.reporting.statistics import (
    as_value,
    bootstrap,
    bootstrap_means,
    clearly_best,
    correct,
    h_o,
    harmonic_mean,
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


def test_constant_rows_have_no_width():
    assert bootstrap([3, 3, 3]) == (3, 3, 3)
    assert bootstrap([True]) == (1, 1, 1)


def test_two_rows_give_both_ends():
    assert bootstrap([0, 1]) == (0.5, 0, 1)
    assert bootstrap([0, 1], level=0.4) == (0.5, 0.5, 0.5)  # half of all resamples are at 0.5


def test_the_interval_is_that_of_all_resamples():
    """Against the whole bootstrap distribution of four rows, 256 equally likely resamples."""
    rows = [0.0, 1.0, 2.0, 7.0]
    every = [np.mean(draw) for draw in itertools.product(rows, repeat=4)]
    value, low, high = bootstrap(rows, resamples=50_000)
    assert value == 2.5
    assert low == pytest.approx(np.quantile(every, 0.025))
    assert high == pytest.approx(np.quantile(every, 0.975))


def test_the_resampled_means_one_by_one():
    rows, random = np.array([0.1, 0.5, 0.7, 0.2, 0.9]), np.random.default_rng(5)
    means = [rows[draw].mean() for draw in random.integers(0, 5, (300, 5))]
    expected = rows.mean(), *np.quantile(means, [0.025, 0.975])
    assert bootstrap(rows, seed=5, resamples=300) == pytest.approx(expected)
    assert bootstrap(rows, seed=6, resamples=300) != pytest.approx(expected)


def test_groups_are_resampled_apart_and_columns_together():
    random = np.random.default_rng(0).random(40)
    opposite = np.stack([random, 1 - random], 1)
    assert bootstrap_means([opposite], lambda a, b: a + b) == pytest.approx((1, 1, 1))
    _, low, high = bootstrap_means([random, 1 - random], lambda a, b: a + b)
    assert low < 0.95 < 1.05 < high


def test_wider_at_higher_level_and_narrower_with_more_rows():
    few, many = [0, 1] * 10, [0, 1] * 200
    assert bootstrap(few, level=0.99)[2] > bootstrap(few, level=0.8)[2] > bootstrap(many)[2]


def test_no_rows_no_value():
    assert bootstrap([]) is None
    assert bootstrap_means([[1], []], harmonic_mean) is None
    assert as_value(None, 0) is None
    assert all(value is None for value in unlearn_canvas([], "concept").values())


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap([1.0, float("nan")]),
        lambda: bootstrap([1.0, float("inf")]),
        lambda: bootstrap_means([[1, 2]], lambda some: some * float("nan")),
        lambda: bootstrap([1, 2], resamples=0),
        lambda: bootstrap([1, 2], level=0),
        lambda: bootstrap([1, 2], level=1),
        lambda: unlearn_canvas(ROWS, "colour"),
    ],
)
def test_refused(call):
    with pytest.raises(ForgetError):
        call()


def test_unlearn_canvas_of_a_concept():
    found = unlearn_canvas(ROWS, "concept")
    assert {key: value["value"] for key, value in found.items()} == {
        "UA": 0.75,
        "IRA": 0.75,
        "CRA": 0.5,
        "HM": pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5)),
    }
    assert [value["n"] for value in found.values()] == [4, 4, 4, 8]
    assert found["UA"]["low"] < 0.75 < found["UA"]["high"]


def test_unlearn_canvas_of_a_style():
    rows = [
        row("target", "dog", "ink", "dog", "ink"),
        row("target", "cat", "ink", "dog", "oil"),
        row("far", "dog", "oil", "cat", "oil"),
    ]
    found = unlearn_canvas(rows, "style")
    assert [found[key]["value"] for key in ("UA", "IRA", "CRA", "HM")] == [0.5, 1, 0, 0]


def test_rows_that_leave_a_domain_open():
    open_style = [{**one, "style": None} for one in ROWS[4:8]]
    found = unlearn_canvas(ROWS[:4] + open_style, "concept")
    assert found["CRA"] is None and found["HM"] is None and found["IRA"]["value"] == 0.75
    half = unlearn_canvas(ROWS[:6] + open_style[2:], "concept")
    assert half["CRA"] == {"value": 0.5, "low": 0, "high": 1, "n": 2}
    assert half["HM"]["value"] == pytest.approx(3 / (1 / 0.75 + 1 / 0.75 + 1 / 0.5))


def test_unsafe_targets_have_no_neighbours():
    rows = [
        row("target", None, None, "dog", "ink", unsafe=said) for said in ("unsafe", "safe", "safe")
    ] + ROWS[4:8]
    found = unlearn_canvas(rows, "unsafe")
    assert found["UA"]["value"] == pytest.approx(2 / 3)
    assert found["CRA"]["value"] == 0.75
    assert found["IRA"] is None and found["HM"] is None
    assert correct(rows, "unsafe") == [True, False, False]


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
