"""What the training node says at the end, in Chromium: why it failed, that it was cancelled, and
whose curves those are."""

import uuid

import pytest
from playwright.sync_api import expect

from .frontend import ARTEFACTS, READY, at_rest, idle
from .test_node_text import NOTHING_RUNS
from .test_training_page import VIEW, opened_graph, saved, start

LONG = '<img src="x" onerror="window.fmnAttacked = true"> ' + "a very long concept " * 12
TRAIN = "app.graph.nodes.find(n => n.type == 'FMN_TrainForgetPatch')"
TEXTS = f"() => {TRAIN}.widgets.filter(w => w.name == '$$node-text-preview').length"


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_a_failure_gives_its_reason(page, nodes_2):
    opened_graph(page, nodes_2, name=LONG)
    page.evaluate(
        """() => { const concept = app.graph.nodes.find(n => n.type == 'FMN_Concept');
                   concept.widgets.find(w => w.name == 'prompts').value = 'a cat'; }"""
    )
    start(page)
    view = page.locator(VIEW)
    view.get_by_text("failed: <img").wait_for()
    expect(view.locator(".fmn-error")).to_contain_text("does not contain the concept '<img")
    expect(view.locator("svg")).to_have_count(0)
    assert "step" not in view.locator(".fmn-content").inner_text()
    title = view.locator(".fmn-title")
    assert title.get_attribute("title").startswith(LONG[:190])
    assert title.evaluate("e => e.scrollWidth > e.clientWidth && e.clientHeight < 24")
    message = page.get_by_role("dialog")  # the page's own, which newer ones do without
    at_rest(page)
    if message.count():
        message.get_by_role("button", name="Close").click()
        message.wait_for(state="detached")
    page.wait_for_function(
        "e => e.scrollHeight <= e.clientHeight + 2", arg=view.element_handle()
    )  # nothing is cut off
    at_rest(page)
    page.screenshot(path=ARTEFACTS / f"training failed, {'nodes 2' if nodes_2 else 'classic'}.png")
    assert view.evaluate("e => e.scrollHeight <= e.clientHeight + 2"), "it does not stay so"
    assert not page.evaluate("window.fmnAttacked") and page.locator("img[onerror]").count() == 0
    assert page.fmn_errors == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_one_place_says_how_far_it_is(page, nodes_2):
    """Also after Cancel: there is no second text on the node that could say something else."""
    opened_graph(page, nodes_2, steps=3000, preview_every=0)
    start(page)
    view = page.locator(VIEW)
    view.get_by_text("running: dog").wait_for()
    view.get_by_text("memory: weights").wait_for()
    expect(view.get_by_text("loss 0")).to_have_count(1)
    assert page.evaluate(TEXTS) == 0
    page.get_by_label("Cancel current run").first.click()
    view.get_by_text("cancelled: dog").wait_for()
    at_rest(page)
    page.screenshot(
        path=ARTEFACTS / f"training cancelled, {'nodes 2' if nodes_2 else 'classic'}.png"
    )
    idle(page)
    assert page.evaluate(TEXTS) == 0
    assert " left" not in view.locator(".fmn-content").inner_text()
    assert page.fmn_errors == []


def test_a_training_whose_server_is_gone_does_not_run_for_ever(page):
    """The server that comes back knows nothing of it, and says that nothing runs."""
    opened_graph(page, nodes_2=False)
    page.evaluate(
        """() => app.api.dispatchCustomEvent('forget-me-not.train', {
          node: String(app.graph.nodes.find(n => n.type == 'FMN_TrainForgetPatch').id),
          workflow: app.graph.id, title: 'dog', status: 'running', step: 1, total: 9,
          seconds_left: 8, losses: [[1, 0.5]], attention: [] })"""
    )
    view = page.locator(VIEW)
    view.get_by_text("running: dog").wait_for()
    page.evaluate(NOTHING_RUNS)
    view.get_by_text("failed: dog").wait_for()
    expect(view.locator(".fmn-error")).to_have_text("The server was stopped.")
    assert page.fmn_errors == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_after_a_reload_each_workflow_has_its_own_curves(page, nodes_2):
    """Workflows with the same node numbers, as templates have, opened in turn."""
    view, kept = page.locator(VIEW), {}
    for name in ("dog", "cat"):
        opened_graph(page, nodes_2, name=name, steps=3, preview_every=0)
        expect(view).to_have_count(0)
        start(page)
        view.get_by_text(f"done: {name}").wait_for()
        kept[name] = page.evaluate("() => app.graph.serialize()")
    assert kept["dog"]["id"] != kept["cat"]["id"]
    saved(page)
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY)
    view.get_by_text("done: cat").wait_for()
    expect(view.locator("polyline.fmn-loss")).to_have_count(1)
    for name, graph in kept.items():
        page.evaluate("graph => app.loadGraphData(graph)", graph)
        view.get_by_text(f"done: {name}").wait_for()
        expect(view).to_have_count(1)
    page.evaluate("graph => app.loadGraphData(graph)", kept["dog"] | {"id": str(uuid.uuid4())})
    page.wait_for_function(f"id => app.graph.id !== id && {TRAIN}", arg=kept["dog"]["id"])
    at_rest(page)
    expect(view).to_have_count(0)
    assert set(page.fmn_errors) <= {"getCanvas: canvas is null"}
