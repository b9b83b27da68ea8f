"""Keys, clipboard, focus and selection on the patch shelf, in Chromium."""

from playwright.sync_api import expect

from .shelf_files import FOLDER, folder_of
from .shelf_page import answer, only, quiet, refresh, row, settled

NODE = """() => { const node = LiteGraph.createNode('FMN_LoadDemoCheckpoint');
                  app.graph.add(node); app.canvas.selectItems([node]); }"""
COUNT = "app.graph.nodes.length"


def selected(page):
    return page.locator("[role=option][aria-selected=true] .fmn-name")


def test_keys_act_on_the_shelf_and_not_on_the_graph(shelf):
    page = shelf
    page.evaluate(NODE)
    kind = page.get_by_label("Kind", exact=True)
    for element in (page.get_by_role("button", name="Refresh", exact=True), kind):
        element.focus()
        page.keyboard.press("Delete")
        page.keyboard.press("Backspace")
    assert page.evaluate(COUNT) == 1
    page.evaluate("window.fmnKeys = []")
    page.evaluate("window.addEventListener('keydown', event => window.fmnKeys.push(event.key))")
    page.keyboard.press("n")  # on the page, it opens the list of nodes
    page.get_by_role("listbox").focus()
    page.keyboard.press("Shift")
    page.wait_for_function("window.fmnKeys.length")
    assert page.evaluate("window.fmnKeys") == ["Shift"]
    quiet(page)


def test_the_clipboard_is_for_text_on_the_shelf(shelf):
    """Events as Ctrl+C and Ctrl+V make them; the page would take them for its nodes."""
    page = shelf
    only(page, FOLDER)
    row(page, "dog").click()
    page.evaluate(NODE)
    taken = page.evaluate(
        """() => {
          const data = new DataTransfer(), taken = {};
          const send = (name, element, type) => {
            const event = new ClipboardEvent(
              type, {clipboardData: data, bubbles: true, cancelable: true});
            element.dispatchEvent(event);
            taken[`${type} ${name}`] = event.defaultPrevented;
          };
          const search = document.querySelector('.fmn-search');
          const fact = document.querySelector('.fmn-details dd');
          send('list', document.querySelector('.fmn-list'), 'copy');  // of nodes
          search.focus();
          for (const type of ['copy', 'cut', 'paste']) send('search', search, type);
          search.blur();
          getSelection().selectAllChildren(fact);
          send('fact', fact, 'copy');
          getSelection().removeAllRanges();
          return taken;
        }"""
    )
    assert taken == {
        "copy list": True, "copy search": False, "cut search": False, "paste search": False,
        "copy fact": False,
    }  # fmt: skip
    page.wait_for_function("app.graph.nodes.length == 1")
    quiet(page)


def test_delete_goes_on_to_the_next_and_leaves_the_focus(shelf):
    """Also while the server takes its time."""
    page = shelf
    only(page, FOLDER)
    row(page, "dog").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    answer(page, "Delete")
    expect(selected(page)).to_have_text("cat")
    expect(page.get_by_role("listbox")).to_be_focused()
    settled(page)
    row(page, "santa claus").click()
    held = []
    page.route("**/forget-me-not/shelf/delete", lambda route: held.append(route))
    with page.expect_request("**/forget-me-not/shelf/delete"):
        page.get_by_role("button", name="Delete", exact=True).click()
        answer(page, "Delete")
    page.get_by_role("searchbox").focus()
    held[0].continue_()
    expect(selected(page)).to_have_text("van gogh")
    settled(page)
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.unroute("**/forget-me-not/shelf/delete")
    quiet(page)


def test_what_was_renamed_stays_selected(shelf, server):
    """Though the list was read anew while the dialog was open, as after a run."""
    page = shelf
    only(page, FOLDER)
    row(page, "cat").click()
    page.get_by_role("listbox").focus()
    page.keyboard.press("F2")
    page.get_by_role("dialog").get_by_role("textbox").fill("puss")
    page.evaluate("document.querySelector('.fmn-head button').click()")
    settled(page)
    page.keyboard.press("Enter")
    page.locator(".fmn-details").get_by_text(f"{FOLDER}/puss.safetensors").wait_for()
    settled(page)
    expect(selected(page)).to_have_text("cat")
    expect(page.get_by_role("listbox")).to_be_focused()
    assert (folder_of(server.base) / "puss.safetensors").exists()
    quiet(page)


def test_pairs_do_not_hide_each_other(shelf):
    page = shelf
    only(page, FOLDER)
    row(page, "cat").click()
    for count in (2, 4, 6):
        page.locator(".fmn-details").get_by_role("button", name="Add to graph").click()
        page.wait_for_function(f"{COUNT} == {count}")
    places = page.evaluate("app.graph.nodes.map(node => [...node.pos])")
    for i, place in enumerate(places):
        for other in places[:i]:
            assert max(abs(a - b) for a, b in zip(place, other)) > 20
    quiet(page)


def test_filters_are_whole_in_a_narrow_window(shelf):
    page = shelf
    page.set_viewport_size({"width": 1100, "height": 1000})
    try:
        refresh(page)
        cut = page.evaluate(
            """() => {
              const pen = document.createElement('canvas').getContext('2d');
              const end = document.querySelector('.fmn-tools').getBoundingClientRect().right;
              return [...document.querySelectorAll('.fmn-select')].filter(each => {
                pen.font = getComputedStyle(each).font;
                return each.getBoundingClientRect().right > end
                  || pen.measureText(each.options[0].label).width > each.clientWidth - 28;
              }).map(each => each.options[0].label);
            }"""
        )
        assert cut == []
    finally:
        page.set_viewport_size({"width": 1600, "height": 1000})
    quiet(page)
