"""The patch shelf in the real frontend, in Chromium: what users do with it."""

import json

import pytest

from .shelf_files import FOLDER, folder_of
from .shelf_page import only, quiet, row, setting


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
    assert page.evaluate("document.querySelector('.fmn-details img').naturalWidth") == 256
    row(page, "junk").click()
    assert page.get_by_role("button", name="Add to graph").last.is_disabled()
    quiet(page)


def test_fit_to_the_graph(shelf):
    page = shelf
    only(page, FOLDER)
    badges = page.locator(".fmn-row .fmn-badge")
    assert badges.all_text_contents()[1:] == ["base unknown"] * 4
    page.evaluate("app.graph.add(LiteGraph.createNode('FMN_LoadDemoCheckpoint'))")
    page.mouse.move(900, 500)
    page.locator(".fmn-search").hover()
    page.get_by_text("In the graph: Demo model").wait_for()
    assert badges.all_text_contents()[1:] == [
        "same base", "same family", "same family", "other family",
    ]  # fmt: skip
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
        page.wait_for_function("document.querySelectorAll('[data-node-id]').length == 4")
        page.get_by_text(f"{FOLDER}/cat.safetensors").first.wait_for()
        assert page.locator("[data-node-id] .p-invalid").count() == 0

    page.get_by_role("listbox").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length == 6")
    assert is_pair(nodes(page)[4:], "dog.safetensors")

    # Each is one step for undo.
    page.locator("#graph-canvas").focus()
    for _ in range(3):  # where Nodes 2.0 measures nodes late, their sizes are a step of its own
        page.keyboard.press("Control+z")
        page.wait_for_timeout(1000)
        if len(nodes(page)) != 6:
            break
    assert len(nodes(page)) == 4
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
    page.wait_for_timeout(200)
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
    assert page.evaluate("document.activeElement.role") == "listbox"

    def active():
        name = box.get_attribute("aria-activedescendant")
        element = page.locator(f"#{name}")
        assert element.get_attribute("aria-selected") == "true"
        assert page.locator("[role=option][aria-selected=true]").count() == 1
        return element.locator(".fmn-name").inner_text()

    steps = [
        ("Home", "junk.safetensors"), ("ArrowUp", "junk.safetensors"), ("ArrowDown", "dog"),
        ("End", "santa claus"), ("ArrowDown", "santa claus"), ("ArrowUp", "van gogh"),
        ("PageUp", "junk.safetensors"),
    ]  # fmt: skip
    for key, expected in steps:
        page.keyboard.press(key)
        assert active() == expected
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Backspace")
    page.keyboard.press("Delete")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("deleted for good").wait_for()
    assert dialog.get_by_role("listitem").all_inner_texts() == [f"{FOLDER}/dog.safetensors"]
    dialog.get_by_role("button", name="Cancel").click()
    dialog.wait_for(state="detached")
    assert len(nodes(page)) == 1
    row(page, "dog").wait_for()
    quiet(page)


def test_delete_and_rename_ask_first(shelf, server):
    page, folder = shelf, folder_of(server.base)
    dialog = page.get_by_role("dialog")
    only(page, FOLDER)
    row(page, "cat").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    dialog.get_by_role("button", name="Delete").click()
    row(page, "cat").wait_for(state="detached")
    assert not (folder / "cat.safetensors").exists()

    row(page, "van gogh").click()
    page.get_by_role("button", name="Rename", exact=True).click()
    assert dialog.get_by_role("textbox").input_value() == "gogh"
    dialog.get_by_role("textbox").fill("../up")
    dialog.get_by_role("button", name="Confirm").click()
    page.get_by_text("a file stays in its folder").wait_for()
    assert (folder / "gogh.safetensors").exists()

    dialog.wait_for(state="detached")  # it fades out, and would take what the next one is to get
    page.get_by_role("listbox").focus()
    page.keyboard.press("F2")
    dialog.get_by_role("textbox").fill("vincent")
    dialog.get_by_role("button", name="Confirm").click()
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
    assert page.get_by_label("Notes", exact=True).input_value() == "best at 0.8\n<b>not bold</b>"
    quiet(page)
