"""Notes on the patch shelf in Chromium: what was written is never lost, and overwrites nothing."""

import json

import pytest
from playwright.sync_api import expect

from .shelf_files import FOLDER, folder_of
from .shelf_page import only, refresh, row, settled

REFRESH = "document.querySelector('.fmn-head button').click()"  # leaves the focus where it is
ROUTES = "**/forget-me-not/shelf**"


@pytest.fixture
def notes(shelf):
    only(shelf, FOLDER)
    row(shelf, "dog").click()
    yield shelf.get_by_label("Notes", exact=True)
    shelf.unroute(ROUTES)
    assert shelf.fmn_errors == []


def kept(server, name="dog"):
    path = folder_of(server.base) / f"{name}.fmn.json"
    return json.loads(path.read_text(encoding="utf-8"))["notes"]


def write(server, text):
    """As another page does."""
    path = folder_of(server.base) / "dog.fmn.json"
    path.write_text(json.dumps({"notes": text}), encoding="utf-8")


def saving(page):
    return page.expect_response(lambda answer: answer.url.endswith("/shelf/notes"))


def test_notes_outlive_a_server_that_is_away(shelf, server, notes):
    page = shelf
    page.route(ROUTES, lambda route: route.abort())
    notes.press_sequentially("first")
    page.evaluate(REFRESH)
    page.get_by_text("The list could not be read").wait_for()
    expect(notes).to_be_focused()
    expect(page.locator(".fmn-row")).to_have_count(5)
    notes.press_sequentially(" words")
    row(page, "cat").click()  # which saves them, or would
    page.get_by_text("Could not change the patch").first.wait_for()
    expect(notes).to_have_value("")
    row(page, "dog").click()
    expect(notes).to_have_value("first words")
    page.get_by_text("not saved yet").wait_for()
    page.unroute(ROUTES)
    page.get_by_role("button", name="Save notes").click()
    page.get_by_text("not saved yet").wait_for(state="detached")
    expect(notes).to_have_value("first words")
    assert kept(server) == "first words"


def test_notes_outlive_a_file_that_was_renamed_elsewhere(shelf, server, notes):
    page, folder = shelf, folder_of(server.base)
    notes.press_sequentially("mine")
    (folder / "dog.safetensors").rename(folder / "hound.safetensors")
    page.evaluate(REFRESH)
    settled(page)
    expect(notes).to_be_focused()
    with saving(page):
        page.get_by_role("listbox").focus()
    settled(page)
    expect(notes).to_have_value("mine")
    (folder / "hound.safetensors").rename(folder / "dog.safetensors")
    refresh(page)
    row(page, "dog").click()
    page.get_by_role("button", name="Save notes").click()
    page.get_by_text("not saved yet").wait_for(state="detached")
    assert kept(server) == "mine"


def test_notes_written_elsewhere_are_shown_and_not_overwritten(shelf, server, notes):
    page = shelf
    notes.press_sequentially("mine")
    write(server, "theirs")
    page.get_by_role("listbox").focus()
    page.get_by_text("notes below were written elsewhere").wait_for()
    expect(page.locator(".fmn-saved-notes")).to_have_text("theirs")
    expect(notes).to_have_value("mine")
    assert kept(server) == "theirs"
    page.get_by_role("button", name="Save notes").click()
    page.locator(".fmn-saved-notes").wait_for(state="detached")
    assert kept(server) == "mine"
    expect(notes).to_have_value("mine")


def test_notes_are_sent_when_the_page_is_left(shelf, server, notes):
    page = shelf
    notes.press_sequentially("in the middle")
    with saving(page) as answer:
        page.evaluate("window.dispatchEvent(new PageTransitionEvent('pagehide'))")
    assert answer.value.ok and kept(server) == "in the middle"
    refresh(page)
    page.get_by_text("not saved yet").wait_for(state="detached")
    expect(notes).to_have_value("in the middle")
