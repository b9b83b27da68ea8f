"""The patch shelf in a page of the frontend: opened, searched, looked at."""

from contextlib import contextmanager

from .shelf_files import fill

TAB = ".forget-me-not\\.shelf-tab-button"


def setting(page, name, value):
    page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])


def open_shelf(page):
    if page.locator(".fmn-shelf").count() == 0:
        page.locator(TAB).click()
    page.locator(".fmn-row").first.wait_for()


def close_shelf(page):
    if page.locator(".fmn-shelf").count():
        page.locator(TAB).click()
    page.locator(".fmn-shelf").wait_for(state="detached")


def refresh(page, count=None):
    page.get_by_role("button", name="Refresh", exact=True).click()
    if count is not None:
        page.get_by_role("status").get_by_text(f"of {count}").wait_for()


def only(page, text):
    """Search; the rows that are left, by their titles."""
    page.get_by_role("searchbox").fill(text)
    return page.locator(".fmn-row .fmn-name").all_text_contents()


def row(page, title):
    return page.locator(".fmn-row").filter(has_text=title)


@contextmanager
def opened_shelf(page, server):
    """The tab open over fresh files and an empty graph; everything said on the console is kept."""
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
    row(page, "dog").wait_for()
    page.fmn_said = said
    yield page
    page.remove_listener("console", keep)
    setting(page, "Comfy.VueNodes.Enabled", False)
    for path in folder.iterdir():
        path.unlink()


def quiet(page):
    assert page.fmn_errors == []
    assert [line for line in page.fmn_said if "forget" in line or "extensions" in line] == []
