"""Workflows of version 0.1, saved by its pages and as its programs sent them, still work."""

import json

import pytest

from .frontend import ROOT, another_workflow
from .template_page import SET
from .test_templates import TINY

DATA = ROOT / "tests" / "data" / "v0.1" / "comfyui"
NODES = json.loads((DATA / "nodes.json").read_text(encoding="utf-8"))
WORKFLOWS = sorted(DATA.glob("*(demo).json"))
OPEN = "async workflow => { await app.loadGraphData(workflow); }"
WIDGETS = """() => app.graph.nodes.filter(node => node.type.startsWith('FMN_')).map(node =>
  [node.id, (node.widgets ?? []).filter(widget => widget.serialize !== false)
    .map(widget => widget.value)])"""


@pytest.mark.parametrize("name", NODES)
def test_inputs_and_outputs_are_where_they_were(server, name):
    """Workflows store values of widgets by their position, and links to outputs by theirs."""
    info = server.get(f"/object_info/{name}")[name]
    inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
    kinds = {key: "COMBO" if isinstance(kind, list) else kind for key, (kind, *_) in inputs.items()}
    before = NODES[name]["inputs"]
    assert list(kinds.items())[: len(before)] == list(before.items())
    # What came later may be left out.
    required = list(info["input"].get("required", {}))
    assert required == list(before)[: len(required)]
    assert info["output"][: len(NODES[name]["outputs"])] == NODES[name]["outputs"]


def test_a_prompt_of_a_program_runs(server):
    outputs = server.run(json.loads((DATA / "prompt.json").read_text(encoding="utf-8")))
    assert server.image(outputs["13"]).std() > 0
    assert outputs["6"]["text"][0].startswith("version 0.1_")
    assert outputs["16"]["text"][0].startswith("2 of 2 concepts have a patch")
    assert all(name in outputs["19"]["text"][0] for name in ("dog", "fox", "ink drawing"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_saved_workflow_opens_with_its_values_and_runs(page, server, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    with another_workflow(page):
        page.evaluate(OPEN, workflow)
    saved = {item["id"]: item.get("widgets_values", []) for item in workflow["nodes"]}
    for key, values in page.evaluate(WIDGETS):
        assert values[: len(saved[int(key)])] == saved[int(key)]
    page.evaluate(SET, TINY)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    outputs = server.run(prompt)
    previews = [key for key, item in prompt.items() if item["class_type"] == "PreviewImage"]
    assert previews and all(server.image(outputs[key]).std() > 0 for key in previews)
