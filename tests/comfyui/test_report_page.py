"""A bench's page in Chromium, opened as a file: no server, no network, no script."""

import os

import pytest

from fmn.bench.reporting.columns import COLUMNS
from fmn.bench.reporting.report import write_report
from tests.unit.summaries import KEYS, TARGETS, make_summary

from .frontend import QUIET

ATTACK = '<img src="http://example.org/x" onerror="window.fmnAttacked = true">'


@pytest.fixture(scope="module")
def chromium(playwright):
    path = os.environ.get("CHROMIUM_PATH") or None
    browser = playwright.chromium.launch(executable_path=path, args=QUIET)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    summary = make_summary()
    return summary, write_report(summary, tmp_path_factory.mktemp("report"))


def opened(browser, path, scheme="light", width=1280):
    """The page, with what it said and asked for in ``fmn_errors`` and ``fmn_requests``."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.fmn_errors, page.fmn_requests = [], []
    page.on("pageerror", lambda error: page.fmn_errors.append(str(error)))
    page.on("console", lambda message: page.fmn_errors.append(message.text))
    page.on("request", lambda request: page.fmn_requests.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    return page


def own_requests(page, path):
    return [url for url in page.fmn_requests if not url.startswith(("data:", path.as_uri()))]


@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_alone(chromium, usual, tmp_path, scheme, width):
    _, paths = usual
    page = opened(chromium, paths["html"], scheme, width)
    assert page.fmn_errors == [] and own_requests(page, paths["html"]) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") == width  # wide tables scroll
    drawn = page.evaluate("[...document.images].map(i => i.naturalWidth > 0 && i.alt.length > 0)")
    assert len(drawn) == 3 + 2 * 6 * 2 and all(drawn)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 100_000
    page.close()


def test_tables_have_the_cells_of_the_summary(chromium, usual):
    summary, paths = usual
    page = opened(chromium, paths["html"])
    main = page.locator("table").first
    titles = [c["title"] for c, _ in COLUMNS if c["group"] == "main" and c["key"] in KEYS]
    heads = main.locator("thead th").all_text_contents()
    assert [head.split("\u2191")[0].split("\u2193")[0] for head in heads] == ["Method", *titles]
    assert main.locator("tbody").count() == 4
    assert main.locator("tbody tr").count() == 4 * (1 + 3)
    rows = [mean for mean in summary["means"] if mean["kind"] == "all"]
    for row, mean in zip(main.locator("tbody").first.locator("tr").all()[1:], rows):
        assert row.locator("th").inner_text().strip() == mean["method"]
        value = mean["values"]["UA"]
        shown = row.locator("td").first.inner_text().split("\n")
        assert shown == [
            f"{100 * value['value']:.1f}",
            f"{100 * value['low']:.1f} to {100 * value['high']:.1f}",
        ]
    alignment = main.locator("td").first.evaluate("cell => getComputedStyle(cell).textAlign")
    assert alignment == "right"
    targets = page.locator("section[aria-labelledby=main] details tbody")
    assert targets.count() == len(TARGETS)
    page.close()


def test_tables_are_reached_by_keys_and_named(chromium, usual):
    _, paths = usual
    page = opened(chromium, paths["html"], width=390)
    for box in page.locator(".scroll").all():
        assert box.get_attribute("tabindex") == "0" and box.get_attribute("aria-label")
    assert page.get_by_role("region", name="Means over targets").count() >= 1
    assert page.get_by_role("navigation", name="Contents").get_by_role("link").count() == 8
    page.close()


def test_markup_in_names_stays_text(chromium, tmp_path):
    targets = {ATTACK: "object", "\u202e\u0643\u0644\u0628": "style", "long" * 500: "object"}
    summary = make_summary(targets, {ATTACK: (0.5, 0.5)}, pictures=4)
    summary |= {"suite": ATTACK, "notes": [ATTACK, "</style><script>fmnAttacked = 1</script>"]}
    summary["grids"] = [
        {**grid, "title": ATTACK, "columns": [ATTACK, '" onerror="fmnAttacked = 1']}
        for grid in summary["grids"]
    ]
    paths = write_report(summary, tmp_path)
    page = opened(chromium, paths["html"], width=390)
    assert page.fmn_errors == [] and own_requests(page, paths["html"]) == []
    assert not page.evaluate("window.fmnAttacked")
    assert page.locator("[onerror]").count() == 0 and page.locator("script").count() == 0
    assert page.locator("h1").inner_text() == f"ConceptBench: {ATTACK}"
    assert page.title() == f"ConceptBench: {ATTACK}"
    assert page.get_by_text(ATTACK).count() > 5
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()
