"""The patch shelf in the real frontend, in Chromium: what users do with it."""

import json
from itertools import groupby

import pytest
from playwright.sync_api import expect

from .frontend import all_nodes, at_rest, setting
from .shelf_files import FOLDER, folder_of
from .shelf_page import answer, only, quiet, refresh, row, settled

# What undo goes back to, the last one last: how many nodes and links there were.
STEPS = """app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue
  .map(each => [each.nodes.length, each.links.length])"""


def nodes(page):
    return page.evaluate(
        """() => app.graph.nodes.map(node => ({type: node.type, pos: [...node.pos],
             file: node.widgets?.find(widget => widget.name == 'file')?.value,
             from: node.inputs?.find(input => input.name == 'patch' && input.link != null)
               && app.graph.links.get(node.inputs.find(i => i.name == 'patch').link).origin_id,
             id: node.id}))"""
    )


def is_pair(found, name):
    """A Load node with the file, and an Apply node that gets its patch."""
    load, apply = sorted(found, key=lambda node: node["type"], reverse=True)
    return (
        [load["type"], apply["type"]] == ["FMN_LoadForgetPatch", "FMN_ApplyForgetPatch"]
        and load["file"] == f"{FOLDER}/{name}"
        and apply["from"] == load["id"]
    )


def test_list_search_and_filters(shelf):
    page = shelf
    assert only(page, FOLDER) == ["junk.safetensors", "dog", "cat", "van gogh", "santa claus"]
    assert only(page, f"{FOLDER} GOGH") == ["van gogh"]
    assert only(page, f"{FOLDER} reread") == ["dog", "santa claus"]
    assert only(page, "no such patch") == []
    page.get_by_text("No patch matches").wait_for()
    only(page, FOLDER)
    page.get_by_label("Family", exact=True).select_option(label="SDXL")
    assert only(page, FOLDER) == ["santa claus"]
    page.get_by_label("Family", exact=True).select_option(label="Family: all")
    page.get_by_label("Kind", exact=True).select_option(label="style")
    assert only(page, FOLDER) == ["van gogh"]
    page.get_by_label("Kind", exact=True).select_option(label="Kind: all")
    page.get_by_label("Method", exact=True).select_option(label="uce")
    assert only(page, FOLDER) == ["cat"]
    page.get_by_label("Method", exact=True).select_option(label="Method: all")
    row(page, "dog").click()
    told = page.locator(".fmn-details").inner_text()
    for part in (
        "dog (object)",
        "reread",
        "UA 97 %, IRA 91 %, M-Score 0.4123",
        "Demo model: dog",
        "2 → 1",
        "May 4, 2026",
    ):
        assert part in told
    page.wait_for_function("document.querySelector('.fmn-details img').naturalWidth == 256")
    row(page, "junk").click()
    expect(page.locator(".fmn-details").get_by_role("button", name="Add to graph")).to_be_disabled()
    quiet(page)


def test_fit_to_the_graph(shelf):
    page = shelf
    only(page, FOLDER)
    badges = page.locator(".fmn-row .fmn-badge")
    damaged, *others = badges.all_text_contents()
    assert others == ["base unknown"] * 4
    page.evaluate("() => { app.graph.add(LiteGraph.createNode('FMN_LoadDemoCheckpoint')); }")
    page.mouse.move(900, 500)
    page.locator(".fmn-search").hover()
    page.get_by_text("In the graph: Demo model").wait_for()
    expect(badges).to_have_text(
        [damaged, "same base", "same family", "same family", "other family"]
    )
    page.get_by_label("Fits the graph").select_option(label="same base")
    assert only(page, FOLDER) == ["dog"]
    page.get_by_label("Fits the graph").select_option(label="Fit: all")
    # A muted loader loads nothing.
    page.evaluate("app.graph.nodes[0].mode = 2")
    page.mouse.move(900, 500)
    page.locator(".fmn-search").hover()
    page.get_by_text("In the graph: no checkpoint").wait_for()
    quiet(page)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_add_by_drag_button_and_key(shelf, nodes_2):
    page = shelf
    setting(page, "Comfy.VueNodes.Enabled", nodes_2)
    only(page, FOLDER)
    place = {"x": 800, "y": 300}
    row(page, "van gogh").drag_to(page.locator("#graph-canvas"), target_position=place)
    page.wait_for_function("app.graph.nodes.length == 2")
    assert is_pair(nodes(page), "gogh.safetensors")
    expected = page.evaluate("app.clientPosToCanvasPos([800, 300])")
    load = next(node for node in nodes(page) if "Load" in node["type"])
    assert max(abs(a - b) for a, b in zip(load["pos"], expected)) < 12

    row(page, "cat").click()
    page.locator(".fmn-details").get_by_role("button", name="Add to graph").click()
    page.wait_for_function("app.graph.nodes.length == 4")
    assert is_pair(nodes(page)[2:], "cat.safetensors")
    if nodes_2:  # the file is newer than the page, and still is one of the choices
        all_nodes(page, nodes_2)
        page.get_by_text(f"{FOLDER}/cat.safetensors").first.wait_for()
        assert page.locator("[data-node-id] .p-invalid").count() == 0

    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length == 6")
    assert is_pair(nodes(page)[4:], "dog.safetensors")

    # Each is one step for undo. In Nodes 2.0 a node that gets its size late is a step between.
    counts = [list(step) for step, _ in groupby(page.evaluate(STEPS))]
    assert counts[-3:] == [[0, 0], [2, 1], [4, 2]]
    if not nodes_2:
        page.locator("#graph-canvas").focus()
        page.keyboard.press("Control+z")
        page.wait_for_function("app.graph.nodes.length == 4")
    quiet(page)


def test_what_is_dropped_has_to_be_on_the_shelf(shelf):
    page = shelf
    for key in ("0/../secret.safetensors", "", "0/" + FOLDER + "/junk.safetensors"):
        page.evaluate(
            """key => {
              const data = new DataTransfer();
              data.setData('application/x-forget-patch', key);
              document.querySelector('#graph-canvas').dispatchEvent(
                new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            key,
        )
    at_rest(page)
    assert nodes(page) == []
    quiet(page)


def test_keys_move_the_selection_and_never_reach_the_canvas(shelf):
    page = shelf
    only(page, FOLDER)
    page.evaluate(
        """() => { const node = LiteGraph.createNode('FMN_LoadDemoCheckpoint');
                   app.graph.add(node); app.canvas.selectItems([node]); }"""
    )
    box = page.get_by_role("listbox")
    page.get_by_role("searchbox").focus()
    for _ in range(5):  # four filters, then the list
        page.keyboard.press("Tab")
    expect(box).to_be_focused()
    selected = box.locator("[role=option][aria-selected=true]")
    steps = [
        ("Home", "junk.safetensors"), ("ArrowUp", "junk.safetensors"), ("ArrowDown", "dog"),
        ("End", "santa claus"), ("ArrowDown", "santa claus"), ("ArrowUp", "van gogh"),
        ("PageUp", "junk.safetensors"),
    ]  # fmt: skip
    for key, expected in steps:
        page.keyboard.press(key)
        expect(selected.locator(".fmn-name")).to_have_text(expected)  # and no other
        expect(box).to_have_attribute("aria-activedescendant", selected.get_attribute("id"))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Backspace")
    page.keyboard.press("Delete")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("permanently deleted").wait_for()
    expect(dialog.get_by_role("listitem")).to_have_text([f"{FOLDER}/dog.safetensors"])
    answer(page, "Cancel")
    assert len(nodes(page)) == 1
    row(page, "dog").wait_for()
    quiet(page)


def test_delete_and_rename_ask_first(shelf, server):
    page, folder = shelf, folder_of(server.base)
    dialog = page.get_by_role("dialog")
    only(page, FOLDER)
    row(page, "cat").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    answer(page, "Delete")
    row(page, "cat").wait_for(state="detached")
    assert not (folder / "cat.safetensors").exists()

    row(page, "van gogh").click()
    page.get_by_role("button", name="Rename", exact=True).click()
    expect(dialog.get_by_role("textbox")).to_have_value("gogh")
    dialog.get_by_role("textbox").fill("../up")
    answer(page, "Confirm")
    page.get_by_text("cannot be used on every system").first.wait_for()
    assert (folder / "gogh.safetensors").exists()

    settled(page)
    page.get_by_role("listbox").focus()
    page.keyboard.press("F2")
    dialog.get_by_role("textbox").fill("vincent")
    answer(page, "Confirm")
    page.get_by_text(f"{FOLDER}/vincent.safetensors").first.wait_for()
    assert (folder / "vincent.safetensors").exists()
    assert not (folder / "gogh.safetensors").exists()
    page.keyboard.press("Escape")
    assert page.fmn_errors == []  # the refusal is an answer 400, which the console shows


def test_notes_are_kept(shelf, server):
    page = shelf
    only(page, FOLDER)
    row(page, "dog").click()
    page.get_by_label("Notes", exact=True).fill("best at 0.8\n<b>not bold</b>")
    row(page, "cat").click()
    page.get_by_text("Notes saved").first.wait_for()
    kept = json.loads((folder_of(server.base) / "dog.fmn.json").read_text(encoding="utf-8"))
    assert kept == {"notes": "best at 0.8\n<b>not bold</b>"}
    assert only(page, "best 0.8 bold") == ["dog"]
    row(page, "dog").click()
    expect(page.get_by_label("Notes", exact=True)).to_have_value("best at 0.8\n<b>not bold</b>")
    quiet(page)


def test_what_is_pressed_stays_while_the_list_is_read_anew(shelf):
    page = shelf
    only(page, FOLDER)
    cat = row(page, "cat")
    cat.hover()
    page.mouse.down()
    page.evaluate("document.querySelector('.fmn-head button').click()")  # Refresh
    settled(page)
    page.mouse.up()
    expect(cat).to_have_attribute("aria-selected", "true")
    quiet(page)


def test_an_answer_that_comes_late_is_not_shown(shelf):
    """Of two, the one that was asked for last counts."""
    page = shelf
    listed = only(page, FOLDER)
    late = []
    page.route(
        "**/forget-me-not/shelf",
        lambda route: route.continue_() if late else late.append(route),
    )
    page.get_by_role("button", name="Refresh", exact=True).click()
    refresh(page)
    with page.expect_event("requestfinished", lambda request: request == late[0].request):
        late[0].fulfill(json={"patches": []})
    page.unroute("**/forget-me-not/shelf")
    page.evaluate("async () => (await fetch('/forget-me-not/shelf')).text()")
    assert only(page, FOLDER) == listed
    quiet(page)
