import copy
import math

import numpy as np
import pytest
from PIL import ImageChops

from fmn.bench.names import UNTOUCHED
from fmn.bench.reporting.plots import (
    bars_with_intervals,
    erased_vs_kept,
    methods,
    plots,
    probe_bars,
)
from fmn.bench.reporting.sheet import (
    GREY,
    PALETTE,
    axis_for,
    colour_of,
    legible,
    place_labels,
    side_by_side,
    text_width,
)
from fmn.errors import ForgetError

from ..summaries import COLUMNS, make_summary, usual_summary


def has_colour(image, colour):
    return longest_run(image, colour) > 0


def test_all_plots_of_a_full_summary():
    found = plots(usual_summary())
    assert [plot.name for plot in found] == ["bars", "erased-vs-kept", "probes"]
    for plot in found:
        assert "esd" in plot.alt
        assert plot.image.mode == "RGB"
        for colour in (GREY, *PALETTE[:2]):  # untouched and two methods
            assert has_colour(plot.image, colour)
        assert not has_colour(plot.image, PALETTE[2])


def test_pictures_have_twice_the_pixels():
    assert bars_with_intervals(usual_summary(), ["UA"]).width == 2 * 960


def test_plots_follow_what_there_is():
    main = [column for column in COLUMNS if column[0] in ("IRA", "KID")]
    assert [plot.name for plot in plots(make_summary(columns=main))] == ["bars"]
    assert plots(make_summary(columns=[COLUMNS[4]])) == []
    text = [column for column in COLUMNS if column[3] == "text"]
    assert [plot.name for plot in plots(make_summary(columns=text))] == ["probes"]


def test_bars_are_as_long_as_their_values():
    summary = make_summary({"dog": "object"}, {"esd": (0.5, 0.9)}, COLUMNS[:1])
    lengths = []
    for share in (0.25, 0.5, 1.0):
        summary["rows"][0]["values"] = {"UA": {"value": share}}
        image = bars_with_intervals(summary, ["UA"])
        lengths.append(longest_run(image, PALETTE[0]))
    assert lengths[1] == pytest.approx(2 * lengths[0], abs=3)
    assert lengths[2] == pytest.approx(4 * lengths[0], abs=5)


def longest_run(image, colour):
    """Pixels of a colour in the row of pixels that has most."""
    match = (np.abs(np.asarray(image, dtype=int) - colour) <= 2).all(axis=2)
    return match.sum(axis=1).max()


def test_whiskers_are_drawn_where_there_is_an_interval():
    summary = usual_summary()
    bare = copy.deepcopy(summary)
    for row in bare["rows"]:
        row["values"] = {key: {"value": v["value"]} for key, v in row["values"].items()}
    for draw in (lambda s: bars_with_intervals(s, ["UA", "IRA"]), erased_vs_kept):
        assert ImageChops.difference(draw(summary), draw(bare)).getbbox()


def test_values_that_were_not_measured():
    summary = usual_summary()
    for row in summary["rows"][::2]:
        row["values"] = {"UA": {"value": None}, "IRA": None}
    for plot in plots(summary):
        assert plot.image.height > 100


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("end", ["value", "low", "high"])
def test_values_that_are_not_finite_are_refused(bad, end):
    summary = usual_summary()
    summary["rows"][3]["values"]["UA"][end] = bad
    summary["means"][3]["values"]["aliases"][end] = bad
    for draw in (lambda s: bars_with_intervals(s, ["UA"]), erased_vs_kept, probe_bars):
        with pytest.raises(ForgetError, match="finite"):
            draw(summary)


def test_many_methods_and_targets():
    ways = {f"method {i}": (0.1 * i, 1 - 0.1 * i) for i in range(10)}
    kinds = ["identity", "object", "style", "unsafe", "odd", "stranger"]
    targets = {f"t{i}": kinds[i % 6] for i in range(30)}
    some = [COLUMNS[0], COLUMNS[1], COLUMNS[2], COLUMNS[5]]
    found = plots(make_summary(targets, ways, some, pictures=6))
    assert len(found) == 3
    assert found[0].image.height > 2 * 30 * 10 * 5
    colours = {colour_of(list(ways), name) for name in ways}
    assert len(colours) == 10


def test_hostile_names_become_letters_that_can_be_drawn():
    names = {
        "<script>" * 50: "object",
        "\u202eevil\n\x1b[2J": "style",
        "\u0643\u0644\u0628": "object",
        "": "x",
    }
    summary = make_summary(names, {'"quoted" & ünïcode' * 9: (0.5, 0.5), UNTOUCHED: (0, 1)})
    assert len(plots(summary)) == 3
    assert legible("Fée", 12, 100) == "Fee"
    assert legible("\u0643\u0644\u0628", 12, 100) == "???"
    assert legible("a\nb\x1b", 12, 100) == "a?b?"
    cut = legible("x" * 10_000, 12, 100)
    assert cut.endswith("...") and text_width(cut, 12) <= 100


def test_the_untouched_model_comes_first_and_is_grey():
    summary = make_summary(ways={"esd": (0.9, 0.8), UNTOUCHED: (0.1, 0.9)})
    assert methods(summary) == [UNTOUCHED, "esd"]
    assert colour_of(methods(summary), UNTOUCHED) == GREY
    assert colour_of(methods(summary), "esd") == PALETTE[0]


@pytest.mark.parametrize(
    "values, low, high, step",
    [([0, 7.5], 0, 8, 2), ([0.03], 0, 0.03, 0.01), ([-3, 5], -4, 6, 2), ([], 0, 1, 0.5)],
)
def test_axes_are_round_and_hold_all_values(values, low, high, step):
    axis = axis_for([{"value": value} for value in values], "s", 0, 100)
    assert (axis.low, axis.high, axis.step) == pytest.approx((low, high, step))
    assert axis.at(low) == 0 and axis.at(high) == 100
    assert len({label for _, label in axis.ticks()}) == len(axis.ticks())


def test_shares_have_an_axis_to_100():
    axis = axis_for([{"value": 0.2}], "%", 50, 250)
    assert axis.at(0.5) == 150
    assert [label for _, label in axis.ticks()] == ["0", "25", "50", "75", "100"]


def test_labels_cover_no_mark_and_no_label():
    points = [(20 + 13 * i, 50 + 7 * (i % 3), f"target {i}") for i in range(30)]
    corners = place_labels(points, (0, 0, 500, 100))
    assert any(corners)
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points] + [
        (*corner, corner[0] + text_width(text, 10), corner[1] + 12)
        for (_, _, text), corner in zip(points, corners)
        if corner
    ]
    labels = boxes[len(points) :]
    assert len(labels) == len(points) - corners.count(None)
    for i, one in enumerate(labels):
        assert one[0] >= 0 and one[1] >= 0 and one[2] <= 500 and one[3] <= 100
        for two in [*boxes[: len(points)], *labels[:i]]:
            apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
            assert apart


def test_marks_at_one_place_stand_side_by_side():
    moved = side_by_side([(10, 5), (30, 5), (10, 5)])
    assert moved == [(4.5, 5), (30, 5), (15.5, 5)]
    crowd = side_by_side([(100, 5)] * 50)
    assert min(crowd)[0] == pytest.approx(78) and max(crowd)[0] == pytest.approx(122)
