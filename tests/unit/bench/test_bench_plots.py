import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fmn.bench.names import UNTOUCHED
from fmn.bench.reporting.plots import dot_plot, plots, scatter_plot
from fmn.bench.reporting.tables import columns_of, overall_means

from ..summaries import make_summary, usual_summary

ROOT = Path(__file__).resolve().parents[3]


def panels(summary, *keys):
    """Axes of a dot plot of some columns."""
    columns = [column for column in summary["columns"] if column["key"] in keys]
    return dot_plot(summary, columns).axes


def dots(axes):
    """(x, y) of each dot, in the order in which they were drawn."""
    return [tuple(map(float, *bar.lines[0].get_xydata())) for bar in axes.containers]


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]


def row_names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_all_plots_of_a_full_summary():
    found = {plot.name: plot for plot in plots(usual_summary())}
    assert list(found) == ["bars", "erased-vs-kept", "probes"]
    titles = [axes.get_title(loc="left") for axes in found["bars"].figure.axes]
    assert titles == ["UA", "IRA", "CRA", "mean"]
    titles = [
        axes.get_title(loc="left") for axes in found["probes"].figure.axes if axes.get_visible()
    ]
    assert titles == ["aliases", "languages", "inversion", "inpainting", "relearn"]
    for plot in found.values():
        assert "untouched, resteer, esd" in plot.alt
        with Image.open(io.BytesIO(plot.png())) as image:
            image.load()
            assert image.format == "PNG" and image.width == 2 * plot.width == 1920
            assert 200 < image.height < 3000
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # not one empty ground


def test_plots_follow_what_was_measured():
    assert [plot.name for plot in plots(make_summary(keys=["IRA", "KID"]))] == ["bars"]
    assert plots(make_summary(keys=["KID"])) == []
    assert [plot.name for plot in plots(make_summary(keys=["aliases"]))] == ["probes"]


def test_a_dot_and_an_interval_for_each_method_best_first():
    summary = usual_summary()
    (axes,) = panels(summary, "HM")
    values = {mean["method"]: mean["values"]["HM"] for mean in overall_means(summary)}
    assert row_names(axes) == ["esd", "resteer", UNTOUCHED]
    assert axes.get_xlabel() == "% (higher is better)"
    assert axes.yaxis_inverted()  # the first row is on top
    for row, (method, (x, y)) in enumerate(zip(row_names(axes), dots(axes))):
        value = values[method]
        assert (x, y) == pytest.approx((100 * value["value"], row))
        _, _, (interval,) = axes.containers[row]
        ends = interval.get_segments()[0][:, 0]
        assert ends == pytest.approx([100 * value["low"], 100 * value["high"]])


def test_each_target_is_a_tick():
    summary = usual_summary()
    (axes,) = panels(summary, "UA")
    ticks = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    rows = [row["values"]["UA"]["value"] for row in summary["rows"] if row["method"] == "esd"]
    assert list(ticks[0]) == pytest.approx([100 * value for value in rows])


def test_probes_are_sorted_by_what_is_lowest():
    (axes,) = panels(usual_summary(), "inversion")
    assert row_names(axes) == ["esd", "resteer", UNTOUCHED]
    assert axes.get_xlabel() == "% (lower is better)"


def test_values_without_interval_and_values_that_were_not_measured():
    summary = usual_summary()
    means = overall_means(summary)
    means[1]["values"]["UA"] = {"value": 0.5}
    del means[2]["values"]["UA"], means[2]["values"]["HM"]
    (axes,) = panels(summary, "UA")
    assert len(dots(axes)) == 2
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == sorted(
        [f"{100 * means[0]['values']['UA']['value']:.1f}", "50.0", "not measured"]
    )
    assert [plot.name for plot in plots(summary)] == ["bars", "erased-vs-kept", "probes"]


def test_erased_against_kept():
    means = overall_means(usual_summary())
    (axes,) = scatter_plot(means).axes
    assert axes.get_xlabel() == "kept: mean of IRA and CRA (%)"
    assert axes.get_ylabel() == "erased: UA (%)"
    expected = [
        (100 * mean["values"]["kept"]["value"], 100 * mean["values"]["UA"]["value"])
        for mean in sorted(means, key=lambda mean: mean["values"]["UA"]["value"])
    ]
    assert dots(axes) == [pytest.approx(point) for point in expected]
    colours = [bar.lines[0].get_color() for bar in axes.containers]
    assert len(set(colours)) == 2  # grey for the untouched model, one colour for all methods


def test_names_of_close_methods_stand_apart():
    methods = {f"method {i}": (0.9, 0.9) for i in range(20)}
    means = overall_means(make_summary({"dog": "object"}, methods, ["UA", "kept"], pictures=4))
    figure = scatter_plot(means)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda b: b.y0)
    names = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(names) == sorted(methods)
    heights = sorted(text.xyann[1] for text in figure.axes[0].texts)
    height = figure.axes[0].get_window_extent().height
    assert min(b - a for a, b in zip(heights, heights[1:])) * height > 9 * figure.dpi / 72
    assert boxes[0].y0 >= 0 and heights[-1] <= 1


def test_names_are_shown_as_they_are():
    """No mathematics between dollars, no control characters, nothing endless."""
    names = ["$x^2$ $", "evil\x1b[2J\nname", "long " * 100]
    summary = make_summary({"dog": "object"}, dict.fromkeys(names, (0.5, 0.5)), pictures=4)
    axes = panels(summary, "UA")[0]
    shown = row_names(axes)
    assert sorted(shown) == sorted(["$x^2$ $", "evil?[2J?name", ("long " * 100)[:31] + "\u2026"])
    for plot in plots(summary):
        assert plot.png().startswith(b"\x89PNG")


def test_many_methods_make_a_higher_plot():
    few, many = (
        make_summary({"dog": "object"}, {f"method {i}": (0.5, 0.5) for i in range(n)}, pictures=3)
        for n in (3, 30)
    )
    columns = columns_of(few, "main")[:4]
    height = dot_plot(few, columns).get_figheight()
    assert dot_plot(many, columns).get_figheight() > height + 20 * 0.2


def test_matplotlib_is_loaded_when_a_plot_is_drawn():
    program = "import sys, fmn.bench.reporting.report as r; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
