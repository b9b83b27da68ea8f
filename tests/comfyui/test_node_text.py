"""Texts of nodes below them, in Chromium."""

import inspect
import re
import uuid

import pytest
from playwright.sync_api import expect

from .frontend import ROOT, at_rest, dress, idle, open_prompt
from .workflows import demo_loader, node, numbered

SHOWN = ".fmn-node-text:not([hidden]) .fmn-content"
STOCK = """() => app.graph.nodes.flatMap(n => n.widgets ?? [])
  .filter(widget => widget.name === '$$node-text-preview').length"""
SAY = """said => app.api.dispatchCustomEvent('forget-me-not.text', {
  node: String(app.graph.nodes.find(n => n.type === 'FMN_TrainForgetPatches').id), ...said })"""
NOTHING_RUNS = (
    """() => app.api.dispatchCustomEvent('status', { exec_info: { queue_remaining: 0 } })"""
)
ATTACK = '<img src="x" onerror="fmnAttacked = 1"> **bold** ![](http://127.0.0.1:9/pixel.png)'


def start(page):
    page.get_by_test_id("queue-button").click()


def batch(folder, names, method=node("FMN_MethodUce", keep_list="none")):
    return demo_loader() | {
        "concepts": node("FMN_ConceptList", text="\n".join(names), kind="object"),
        "method": method,
        "batch": node(
            "FMN_TrainForgetPatches",
            model=["demo", 0], clip=["demo", 1], concepts=["concepts", 0], method=["method", 0],
            folder=folder,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_a_result_replaces_the_progress(page, nodes_2):
    """A text is nothing but text, and a long one does not make a node endless."""
    dress(page, nodes_2)
    open_prompt(page, numbered(batch(f"shown {nodes_2}", ["dog"])), nodes_2)
    text = page.locator(SHOWN)
    expect(text).to_have_count(0)
    long = "\n".join([ATTACK] * 60)
    page.evaluate(SAY, {"text": long})
    text.wait_for()
    assert text.evaluate("e => e.textContent") == long
    assert text.evaluate("e => e.clientHeight <= 400 && e.scrollHeight > e.clientHeight")
    assert text.locator("img, b, strong").count() == 0
    scale = page.evaluate("app.canvas.ds.scale")
    text.click()  # newer pages give the wheel to what has the focus
    page.mouse.wheel(0, 120)
    page.wait_for_function("e => e.scrollTop > 0", arg=text.element_handle())
    assert page.evaluate("app.canvas.ds.scale") == scale
    start(page)
    expect(text).to_contain_text("1 of 1 concepts have a patch")
    expect(text).to_have_count(1)
    assert page.evaluate(STOCK) == 0 and not page.evaluate("window.fmnAttacked")
    assert "1 of 1" not in page.evaluate("() => JSON.stringify(app.graph.serialize())")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_outputs_of_an_earlier_run_are_shown_again(page, nodes_2):
    """As when the page opens a run of its queue."""
    dress(page, nodes_2)
    open_prompt(page, numbered(batch("again", ["dog"])), nodes_2)
    page.evaluate("() => { app.nodeOutputs = { 4: { node_text: ['1 of 1', 'as before'] } }; }")
    text = page.locator(SHOWN)
    expect(text).to_have_text("1 of 1\nas before")
    page.evaluate("() => { app.nodeOutputs = { 9: { node_text: ['of no node'] }, 1: {} }; }")
    expect(text).to_have_count(1)
    assert page.fmn_errors == []


def test_a_text_goes_to_the_workflow_that_was_run(page):
    """Not to the node of the same number in another one, which is open by then."""
    dress(page, nodes_2=False)
    # With a rank: frontend 1.49.6 gives a node what one of its number had in an earlier workflow.
    slow = node("FMN_MethodResteer", steps=60, rank=4)
    open_prompt(page, numbered(batch("slow", ["dog"], slow)))
    page.evaluate("id => { app.graph.id = id; }", str(uuid.uuid4()))
    text = page.locator(SHOWN)
    start(page)
    expect(text).to_contain_text("dog")  # it has begun
    open_prompt(page, numbered(batch("slow", ["dog"], slow)))
    page.evaluate(SAY, {"workflow": str(uuid.uuid4()), "text": "1 of 9"})
    idle(page)
    at_rest(page)
    expect(text).to_have_count(0)
    assert page.fmn_errors == []


def test_what_ends_before_its_result_says_so(page):
    dress(page, nodes_2=False)
    page.fmn_errors.clear()
    long = node("FMN_MethodResteer", steps=3000)
    open_prompt(page, numbered(batch("cancelled", ["dog"], long)))
    text = page.locator(SHOWN)
    page.evaluate(SAY, {"text": "1 of 9"})
    expect(text).to_have_text("1 of 9")
    page.evaluate(NOTHING_RUNS)  # after a restart of the server
    expect(text).to_have_text("stopped")
    start(page)
    expect(text).to_contain_text("dog")
    page.get_by_label("Cancel current run").first.click()
    expect(text).to_have_text("cancelled")
    idle(page)
    assert page.fmn_errors == []


def test_a_text_can_be_copied(page):
    """Though the page copies nodes with the same keys."""
    page.context.grant_permissions(["clipboard-read"])
    dress(page, nodes_2=False)
    open_prompt(page, numbered(batch("copied", ["dog"])))
    page.evaluate(SAY, {"text": "1 of 9"})
    page.locator(SHOWN).evaluate("e => getSelection().selectAllChildren(e)")
    page.keyboard.press("Control+c")
    assert page.evaluate("navigator.clipboard.readText()") == "1 of 9"


def test_all_nodes_with_a_text_have_an_element_for_it(pack):
    nodes = [node for module in pack("nodes").MODULES for node in module.NODES]
    names = {
        node.define_schema().node_id
        for node in nodes
        if "text_output(" in inspect.getsource(node.execute)
    }
    script = (ROOT / "web" / "node_text.js").read_text(encoding="utf-8")
    assert names == set(re.findall(r"(FMN_\w+): \d", script))
    assert len(names) > 10
