"""The patch shelf in a page of the frontend: opened, searched, looked at."""

from contextlib import contextmanager

from .frontend import setting
from .shelf_files import fill

TAB = ".forget-me-not\\.shelf-tab-button, [data-testid^='forget-me-not.shelf']"


def open_shelf(page):
    if page.locator(".fmn-shelf").count() == 0:
        page.locator(TAB).click()
    settled(page)
    page.locator(".fmn-row").first.wait_for()


def settled(page):
    """Wait until the list shows what is in the folders: no answer of the server is to come."""
    page.locator(".fmn-list[aria-busy=false]").wait_for()


def close_shelf(page):
    if page.locator(".fmn-shelf").count():
        page.locator(TAB).click()
    page.locator(".fmn-shelf").wait_for(state="detached")


def refresh(page):
    page.get_by_role("button", name="Refresh", exact=True).click()
    settled(page)


def only(page, text):
    """Search; the rows that are left, by their titles."""
    settled(page)
    page.get_by_role("searchbox").fill(text)
    return page.locator(".fmn-row .fmn-name").all_text_contents()


def row(page, title):
    return page.locator(".fmn-row").filter(has_text=title)


def answer(page, name):
    """Press a button of the dialog, and wait until it has faded out."""
    page.get_by_role("dialog").get_by_role("button", name=name).click()
    page.get_by_role("dialog").wait_for(state="detached")


def dismiss(page):
    """Escape from the dialog, which has the focus once it has faded in."""
    page.wait_for_function(
        "document.querySelector('[role=dialog]').contains(document.activeElement)"
    )
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")


@contextmanager
def opened_shelf(page, server):
    """The tab open over fresh files and an empty graph; everything said on the console is kept."""
    for left in server.base.rglob("forget_patches/**/*.safetensors"):
        left.unlink()  # of other tests
    folder = fill(server.base)
    said = []

    def keep(message):
        if message.type == "error":
            said.append(f"{message.text} {message.location.get('url', '')}")

    page.on("console", keep)
    page.fmn_errors.clear()
    page.evaluate("app.graph.clear()")
    open_shelf(page)
    page.get_by_role("searchbox").fill("")
    refresh(page)
    page.locator(".fmn-row").first.wait_for()
    page.fmn_said = said
    yield page
    page.remove_listener("console", keep)
    setting(page, "Comfy.VueNodes.Enabled", False)
    for path in folder.iterdir():
        path.unlink()


def quiet(page):
    assert page.fmn_errors == []
    assert [line for line in page.fmn_said if "forget" in line or "extensions" in line] == []
