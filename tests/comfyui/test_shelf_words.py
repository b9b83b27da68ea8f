"""The words of the patch shelf, in Chromium: none is cut; anchors; the question for a new name."""

import pytest
from PIL import Image

from fmn.concepts.concept import Concept

from .frontend import ARTEFACTS, dress, setting
from .shelf_files import FOLDER, folder_of, write
from .shelf_page import close_shelf, only, open_shelf, quiet, refresh, row

# Texts that are cut off: badges, dates that are shown, and filters, for each of their choices.
CUT = """() => {
  const all = (name, root = document) => [...root.querySelectorAll(name)];
  const over = e => e.scrollWidth > e.clientWidth;
  const beyond = (e, box) =>
    e.top < box.bottom - 1 && (e.right > box.right || e.bottom > box.bottom + 1);
  const places = all('.fmn-row .fmn-fit').flatMap(line => all('.fmn-date', line).filter(date =>
    beyond(date.getBoundingClientRect(), line.getBoundingClientRect())));
  const pen = document.createElement('canvas').getContext('2d');
  const choices = all('.fmn-select').flatMap(select => {
    pen.font = getComputedStyle(select).font;
    const room = select.clientWidth - 28; // its padding and arrow
    return [...select.options].filter(option => pen.measureText(option.label).width > room);
  });
  return [...all('.fmn-badge').filter(over), ...places, ...choices].map(e => e.textContent);
}"""
PROMPTS = {
    "en": ("hidden by another file", "Search name, concept, notes"),
    "zh": ("被同名文件遮挡", "搜索名称、概念、备注"),
}


@pytest.fixture
def corrections(shelf, server):
    """The shelf with a patch that corrects a word, and one that another hides."""
    puppy = Concept("puppy", aliases=("pup", "<b>whelp</b>"), anchor="dog")
    write(folder_of(server.base), "puppy.safetensors", "puppy", concepts=[puppy.describe()])
    output = server.base / "output" / "forget_patches" / FOLDER
    output.mkdir(parents=True, exist_ok=True)
    hidden = write(output, "dog.safetensors", "dog", date="2020-01-02T00:00:00+00:00")
    refresh(shelf)
    row(shelf, "puppy").wait_for()
    yield shelf
    hidden.unlink()


@pytest.mark.parametrize("language", PROMPTS)
def test_no_words_are_cut(corrections, language):
    page = corrections
    badge, search = PROMPTS[language]
    setting(page, "Comfy.Locale", language)
    try:
        close_shelf(page)
        open_shelf(page)
        page.get_by_placeholder(search).wait_for()
        only(page, FOLDER)
        hidden = page.locator(".fmn-row .fmn-badge").get_by_text(badge)
        hidden.wait_for()
        assert len(hidden.get_attribute("title")) > len(badge)
        row(page, "puppy").click()
        page.locator(".fmn-list").evaluate("e => { e.scrollTop = 1e6; }")
        page.screenshot(path=ARTEFACTS / f"shelf words {language}.png")
        assert page.evaluate(CUT) == []
        page.evaluate("document.querySelector('.fmn-select').options[0].label += ' and much more'")
        assert len(page.evaluate(CUT)) == 1  # so it would be seen
    finally:
        setting(page, "Comfy.Locale", "en")
        close_shelf(page)
    quiet(page)


def test_anchors_and_aliases_are_told_and_found(corrections):
    page = corrections
    assert only(page, f"{FOLDER} puppy") == ["puppy → dog"]
    assert only(page, f"{FOLDER} whelp") == ["puppy → dog"]
    row(page, "puppy").click()
    told = page.locator(".fmn-details dd").first.inner_text()
    assert told == "puppy → dog (object; also pup, <b>whelp</b>)"
    assert page.locator(".fmn-shelf b").count() == 0
    quiet(page)


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_the_question_for_a_new_name(corrections, server, palette):
    page, folder = corrections, folder_of(server.base)
    beside = ["puppy.jpg", "puppy.fmn.json", "puppy.fmn-train"]
    Image.new("RGB", (64, 64), "teal").save(folder / beside[0])
    (folder / beside[1]).write_text('{"notes": "good"}')
    (folder / beside[2]).write_bytes(b"no state")
    dress(page, False, palette)
    refresh(page)
    only(page, f"{FOLDER} good")
    row(page, "puppy").click()
    page.get_by_role("listbox").focus()
    page.keyboard.press("F2")
    dialog = page.get_by_role("dialog", name="Rename the patch")
    name = dialog.get_by_label("New name", exact=True)
    assert name.input_value() == "puppy"
    assert name.evaluate("e => e === document.activeElement && e.selectionEnd === 5")
    files = dialog.get_by_role("listitem").all_inner_texts()
    assert files == [f"{FOLDER}/puppy.safetensors", *beside]
    dialog.get_by_text("no longer find the patch").wait_for()
    page.screenshot(path=ARTEFACTS / f"shelf rename {palette}.png")
    tops = "all => all.map(e => e.getBoundingClientRect()).map(box => [box.top, box.bottom])"
    places = dialog.locator("h2, input, p, ul, .fmn-actions").evaluate_all(tops)
    assert all(below[0] >= above[1] for above, below in zip(places, places[1:])), "they overlap"

    page.keyboard.press("Delete")  # the letters, not the patch
    assert name.input_value() == ""
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate("document.activeElement.role") == "listbox"
    assert {path.name for path in folder.glob("puppy*")} == {"puppy.safetensors", *beside}

    page.keyboard.press("F2")
    page.keyboard.type("whelp")
    page.keyboard.press("Enter")
    page.get_by_text(f"{FOLDER}/whelp.safetensors").first.wait_for()
    assert not list(folder.glob("puppy*")) and len(list(folder.glob("whelp*"))) == 4
    dress(page, False)
    quiet(page)
