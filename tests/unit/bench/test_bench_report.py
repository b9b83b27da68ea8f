import copy
import json
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from fmn.bench.reporting.report import (
    NO_PLOTS,
    in_short,
    markdown,
    markdown_table,
    target_table,
    write_report,
)
from fmn.bench.reporting.tables import lead, number, to_cell
from fmn.errors import ForgetError

from ..summaries import TARGETS, make_summary, usual_summary

HOSTILE = {
    '<script>alert("x")</script>': "object",
    "\"'><img src=x onerror=alert(1)>": "style",
    "long " * 500: "object",
    "\u202e\u0643\u0644\u0628": "identity",
    "| pipe ` * _ [a](http://example.org) \n# head": "object",
    "&lt;b&gt;": "object",
}


class Page(HTMLParser):
    """Tags, and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells, self.stack = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("img", "meta"):
            self.stack.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.stack):
            self.cells[-1] += data


def read(paths, name):
    return paths[name].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The files of a report on the usual summary."""
    return write_report(usual_summary(), tmp_path_factory.mktemp("report") / "new" / "folder")


def one_cell():
    return make_summary({"dog": "object"}, {"esd": (0.5, 0.5)}, ["UA"], pictures=1)


def test_all_files_are_written(usual):
    paths = usual
    assert set(paths) == {"html", "md", "json", "bars", "erased-vs-kept", "probes"}
    assert sorted(file.name for file in paths["html"].parent.iterdir()) == sorted(
        path.name for path in paths.values()
    )
    for name in ("bars", "erased-vs-kept", "probes"):
        with Image.open(paths[name]) as image:
            assert image.format == "PNG"


def test_the_page_holds_all_and_asks_for_nothing(usual):
    text = read(usual, "html")
    page = Page(text)
    assert page.stack == []
    assert "script" not in page.tags and "link" not in page.tags
    sources = [value for key, value in page.attributes if key == "src"]
    assert len(sources) == 3 + 2 * 6 * 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    targets = [value for key, value in page.attributes if key == "href"]
    ids = [value for key, value in page.attributes if key == "id"]
    assert targets and set(targets) <= {f"#{name}" for name in ids}
    assert "url(" not in text and "@import" not in text
    assert page.tags.count("img") == len([1 for key, _ in page.attributes if key == "alt"])
    for said in ("9f3a11c07be2d4e8", "guidance 5.0", "goblin", "python -m fmn bench"):
        assert said in text


def test_cells_have_values_intervals_and_gaps(tmp_path):
    summary = make_summary(
        {"dog": "object"}, {"esd": (0.5, 0.5)}, ["UA", "IRA", "CRA", "HM", "KID"]
    )
    summary["means"] = [
        {"kind": "object", "method": "esd", "targets": ["dog"], "values": {
            "UA": {"value": 0.875, "low": 0.75, "high": 1.0, "n": 8},
            "IRA": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 2},
            "KID": {"value": -0.0123},
        }}
    ]  # fmt: skip
    cells = Page(read(write_report(summary, tmp_path), "html")).cells
    row = cells[cells.index("object (1)") + 1 :][:6]
    assert row == [
        "esd", "87.575.0 to 100.0", "50.00.0 to 100.0, n 2", "not measured", "not measured",
        "\u22120.0123",
    ]  # fmt: skip


def test_without_matplotlib_the_report_says_so_and_has_no_plots(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fmn.bench.reporting.plots", raising=False)
    summary = usual_summary()
    paths = write_report(summary, tmp_path)
    assert set(paths) == {"html", "md", "json"} and not list(tmp_path.glob("*.png"))
    assert NO_PLOTS in json.loads(read(paths, "json"))["notes"]
    assert "matplotlib is not installed" in read(paths, "html")
    assert "matplotlib is not installed" in read(paths, "md")
    assert caplog.messages == [NO_PLOTS]
    assert "<table" in read(paths, "html") and NO_PLOTS not in summary["notes"]


def test_tables_say_what_heads_what(usual):
    page = Page(read(usual, "html"))
    assert page.tags.count("table") == page.tags.count("caption")
    scopes = [value for key, value in page.attributes if key == "scope"]
    assert page.tags.count("th") == len(scopes)
    assert set(scopes) == {"col", "row", "rowgroup"}


def test_hostile_names_stay_text(tmp_path):
    attack = '<script>alert("x")</script>'
    summary = make_summary(HOSTILE, {attack: (0.5, 0.5), "untouched": (0.1, 0.9)}, pictures=4)
    for field in ("suite", "judge", "check", "made", "command"):
        summary[field] = attack
    summary["notes"] = [attack]
    summary["model"] = {"family": attack, "fingerprint": attack}
    summary["sampling"] = {attack: attack}
    summary["columns"][0] |= {"title": attack, "what": attack, "unit": attack}
    summary["grids"][0] |= {"title": attack, "columns": [attack, '" onerror="alert(1)']}
    summary["grids"][0]["rows"][0]["label"] = '" onerror="alert(1)'
    summary["grids"][0]["rows"][0]["pictures"][0] = '"><script>alert(1)</script>'
    summary["scale"][0]["what"] = attack
    paths = write_report(summary, tmp_path)
    text = read(paths, "html")
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert page.stack == [] and "script" not in page.tags
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert "\u202e" not in text and "\u0643\u0644\u0628" in text
    for line in markdown_table(summary).splitlines() + target_table(summary).splitlines():
        assert line.startswith("| ") and line.endswith(" |") and "<script" not in line
    heads = target_table(summary).splitlines()[0]
    for line in target_table(summary).splitlines():
        assert line.replace("\\|", "").count("|") == heads.count("|")


def test_nothing_measured_says_what_to_do(tmp_path):
    with pytest.raises(ForgetError, match="Nothing was measured.*run the bench"):
        write_report(usual_summary() | {"rows": [], "means": []}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ForgetError, match="could not be saved"):
        write_report(one_cell(), tmp_path / "file")


def test_json_is_stable_and_without_pictures(tmp_path):
    summary = one_cell()
    kept = copy.deepcopy(summary)
    text = read(write_report(summary, tmp_path / "a"), "json")
    turned = dict(reversed(summary.items()))
    assert text == read(write_report(turned, tmp_path / "b"), "json")
    assert summary == kept
    assert "iVBORw0KGgo" not in text
    data = json.loads(text)
    assert data["rows"] == summary["rows"] and data["columns"] == summary["columns"]
    assert data["grids"][0]["rows"][0] == {"label": "a dog, style 0"}


def test_bold_only_beyond_all_intervals():
    values = {
        "untouched": {"value": 1.0, "low": 0.99, "high": 1.0, "n": 36},
        "first": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 36},
        "second": {"value": 0.6, "low": 0.5, "high": 0.7, "n": 36},
    }
    summary = make_summary({"dog": "object"}, dict.fromkeys(values, (0.5, 0.5)), ["UA"])
    summary["means"] = [
        {"kind": "object", "method": name, "targets": ["dog"], "values": {"UA": value}}
        for name, value in values.items()
    ]
    assert markdown_table(summary).splitlines()[2:] == [
        "| untouched | 100.0 (99.0 to 100.0) |",
        "| first | **90.0** (80.0 to 95.0) |",
        "| second | 60.0 (50.0 to 70.0) |",
    ]
    assert in_short(summary) == "untouched: UA 100.0 %\nfirst: UA 90.0 %\nsecond: UA 60.0 %"
    values["second"]["high"] = 0.8
    assert "**" not in markdown_table(summary)


def test_markdown_tables():
    summary = usual_summary()
    lines = markdown_table(summary).splitlines()
    assert lines[0] == "| targets | method | UA (%) | IRA (%) | CRA (%) | mean (%) |"
    assert lines[1] == "| --- | --- | ---: | ---: | ---: | ---: |"
    assert len(lines) == 2 + 4 * 3 and lines[2].startswith("| all | untouched |")
    short = in_short(summary).splitlines()  # over all targets, not a kind's
    assert len(short) == 3
    for line, row in zip(short, lines[2:5]):
        method, *cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        ua = cells[0].split("*")[0].split(" (")[0]
        assert line.startswith(f"{method}: UA {ua} %, IRA ")
    kid = [column for column in summary["columns"] if column["key"] == "KID"]
    assert markdown_table(summary, kid).splitlines()[0] == "| targets | method | KID |"
    assert len(target_table(summary).splitlines()) == 2 + 3 * len(TARGETS)
    assert "| esd |" in markdown(summary) and "goblin" in markdown(summary)


def test_a_summary_of_one_method_and_few_columns(tmp_path):
    summary = one_cell() | {"scale": [], "grids": [], "notes": [], "check": None}
    paths = write_report(summary, tmp_path)
    assert "Second judge: none" in read(paths, "md")
    assert lead(summary).startswith("1 method of forgetting on 1 target:")


def test_a_summary_without_main_columns(tmp_path):
    summary = make_summary({"dog": "object"}, {"esd": (0.5, 0.5)}, ["aliases", "languages"])
    assert markdown_table(summary).startswith("| targets | method | aliases (%) | languages (%) |")
    page = Page(read(write_report(summary, tmp_path), "html"))
    assert ("href", "#text") in page.attributes and ("href", "#main") not in page.attributes
    assert page.cells.count("dog · object") == 1


def test_many_methods_and_targets(tmp_path):
    methods = {f"method {i}": (0.1 * i, 1 - 0.1 * i) for i in range(8)}
    targets = {f"target {i}": ("identity", "object", "style")[i % 3] for i in range(30)}
    summary = make_summary(targets, methods, ["UA", "aliases"], pictures=6)
    text = read(write_report(summary, tmp_path), "html")
    assert Page(text).cells.count("target 29 · style") == 2  # main and text


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.9306, "%", "93.1"), (1, "%", "100.0"), (0.002, "%", "0.20"), (0, "%", "0.0"),
        (1234.5, "s", "1,234"), (12.345, "s", "12.3"), (1.5, "MB", "1.50"), (0, "", "0"),
        (0.012345, "", "0.0123"), (-0.5, "", "-0.500"), (0.00001, "", "1.00e-05"),
    ],
)  # fmt: skip
def test_numbers(value, unit, text):
    assert number(value, unit) == text


def test_intervals_say_when_they_are_unreliable():
    value = {"value": 0.5, "low": 0, "high": 1, "n": 5}
    assert to_cell(value, "%") == ("50.0", "0.0 to 100.0", False)
    assert to_cell(value | {"n": 4}, "%", True) == ("50.0", "0.0 to 100.0, n 4", True)
    assert to_cell({"value": 0.5}, "") == ("0.500", "", False)
    assert to_cell(None, "%").number == ""
