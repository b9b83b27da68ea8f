"""What the pack adds to the real frontend, in Chromium: templates, help pages, texts on nodes."""

import json

import pytest
from playwright.sync_api import expect

from .frontend import ARTEFACTS, TEMPLATES, dress, open_prompt
from .workflows import demo_loader, node, saving, training


def test_help_pages_are_served(page, server):
    """The frontend finds each node's page where it looks for it."""
    names = page.evaluate(
        "Object.keys(LiteGraph.registered_node_types).filter(n => n.startsWith('FMN_'))"
    )
    assert len(names) > 25
    for name in names:
        status = page.evaluate(
            "async name => (await fetch(`/extensions/forget-me-not/docs/${name}.md`)).status", name
        )
        assert status == 200, name


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_saved_widget_values_still_mean_what_they_say(server, path):
    """A template stores values by position: each must be one that its input allows."""
    info = server.get("/object_info")
    workflow = json.loads(path.read_text(encoding="utf-8"))
    ours = [item for item in workflow["nodes"] if item["type"].startswith("FMN_")]
    assert ours
    for item in ours:
        inputs = info[item["type"]]["input"]
        widgets = [
            (name, spec)
            for part in ("required", "optional")
            for name, spec in inputs.get(part, {}).items()
            if spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        ]
        values = item.get("widgets_values") or []
        # A workflow may be older than a node's last widgets; those take their defaults.
        assert bool(values) == bool(widgets) and len(values) <= len(widgets), item["type"]
        for (name, (kind, options)), value in zip(widgets, values):
            if kind == "COMBO":
                assert value in options["options"], name
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], name
            else:
                assert isinstance(value, bool if kind == "BOOLEAN" else str), name


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_markup_in_a_stranger_s_patch_stays_text(page, server, nodes_2):
    """Metadata is text from a stranger: shown, never run, in both renderers."""
    attack = '<img src="x" onerror="window.fmnAttacked = true">'
    made = server.run(
        demo_loader() | training(attack, training_seed=31 + nodes_2) | saving("attack")
    )
    graph = {
        "1": node("FMN_LoadForgetPatch", file=made["save"]["text"][0]),
        "2": node("FMN_InspectForgetPatch", patch=["1", 0]),
    }
    dress(page, nodes_2)
    open_prompt(page, graph, nodes_2)
    told = page.get_by_text("forgets: <img src=")
    expect(told).to_have_count(0)
    page.get_by_test_id("queue-button").click()
    told.first.wait_for()
    page.screenshot(path=ARTEFACTS / f"markup {'nodes 2' if nodes_2 else 'classic'}.png")
    assert not page.evaluate("window.fmnAttacked")
    assert page.locator("img[onerror]").count() == 0
