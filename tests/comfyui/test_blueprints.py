"""The subgraph blueprints: listed by the server, added to a graph in the page, and run."""

import json
import re

import pytest

from .conftest import ROOT
from .frontend import ARTEFACTS, open_prompt, setting
from .workflows import node

FILES = sorted((ROOT / "subgraphs").glob("*.json"))
NAMES = ["Forget a Concept", "Use a Forget Patch"]
SHOWN = dict(zip(NAMES, (["name", "kind", "anchor", "aliases", "strength"], ["file", "strength"])))
AROUND = {
    "1": node("FMN_LoadDemoCheckpoint"),
    "2": node("CLIPTextEncode", text="a photo of a dog"),
    "3": node("EmptyLatentImage", width=128, height=128, batch_size=1),
    "4": node(
        "KSampler", seed=1, steps=2, cfg=3.5, sampler_name="euler", scheduler="normal",
        positive=["2", 0], negative=["2", 0], latent_image=["3", 0], denoise=1.0,
    ),
    "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
    "6": node("PreviewImage", images=["5", 0]),
    "7": node("FMN_InspectForgetPatch"),
}  # fmt: skip
# The page reads blueprints while it is used already, and searches only what it has by then.
OFFERED = """name => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
  const known = stores.get('subgraph').subgraphBlueprints  // frontend 1.58 has them elsewhere
    ?? stores.get('nodeDef').nodeDefs;
  return known.some(each => each.display_name === name);
}"""
CONNECT = """
values => {
  const added = app.graph.nodes.find(n => n.subgraph), byId = id => app.graph.getNodeById(id);
  const link = (from, output, to, input) => from.connect(
    from.findOutputSlot(output), to, to.findInputSlot(input));
  link(byId(1), 'MODEL', added, 'model');
  link(byId(1), 'CLIP', added, 'clip');
  link(added, 'MODEL', byId(4), 'model');
  link(added, 'CLIP', byId(2), 'clip');
  link(added, 'patch', byId(7), 'patch');
  for (const [name, value] of Object.entries(values))
    added.widgets.find(w => w.name === name).value = value;
  return { title: added.title, widgets: added.widgets.map(w => [w.name, w.value]) };
}
"""


def test_the_server_lists_them(server):
    listed = server.get("/global_subgraphs")
    ours = {
        entry["name"]: key
        for key, entry in listed.items()
        if entry["info"]["node_pack"] == "custom_nodes.forget-me-not"
    }
    assert sorted(ours) == NAMES == [path.stem for path in FILES]
    for path in FILES:
        sent = server.get(f"/global_subgraphs/{ours[path.stem]}")["data"]
        assert sent == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_sets_what_it_shows(server, path):
    """Widgets are saved by position, and those on the outside by name, as inputs: a page may give
    inner nodes other numbers."""
    saved, info = json.loads(path.read_text(encoding="utf-8")), server.get("/object_info")
    (outside,), (subgraph,) = saved["nodes"], saved["definitions"]["subgraphs"]
    assert outside["type"] == subgraph["id"]
    inside = {str(item["id"]): item for item in subgraph["nodes"]}
    assert {number for number, _ in outside["properties"]["proxyWidgets"]} <= {"-1"}  # none inside
    links = {link["id"]: link for link in subgraph["links"]}
    shown = [part["name"] for part in outside["inputs"] if "widget" in part]
    assert shown == SHOWN[path.stem] and len(outside["widgets_values"]) == len(shown)
    for part in (part for part in subgraph["inputs"] if part["name"] in shown):
        (link,) = (links[key] for key in part["linkIds"])
        inner = inside[str(link["target_id"])]["inputs"][link["target_slot"]]
        assert inner["widget"]["name"] == part["name"]
    for item in inside.values():
        widgets = [part["name"] for part in item["inputs"] if "widget" in part]
        inputs = info[item["type"]]["input"]
        known = {**inputs.get("required", {}), **inputs.get("optional", {})}
        current = [
            name for name, spec in known.items()
            if spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        ]  # fmt: skip
        assert sorted(widgets) == sorted(current), f"{item['type']}: run tools/examples.py"
        assert len(item.get("widgets_values") or []) == len(widgets)


@pytest.mark.parametrize("name", NAMES)
def test_one_is_added_from_the_search_box_and_runs(server, page, name):
    page.fmn_errors.clear()
    setting(page, "Comfy.VueNodes.Enabled", False)
    open_prompt(page, AROUND)
    page.evaluate("() => { app.canvas.ds.scale = 0.3; app.canvas.ds.offset = [900, 400]; }")
    page.wait_for_function(OFFERED, arg=name)
    # Not by a double click: on a slow machine it is two clicks.
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    search = page.get_by_placeholder(re.compile("search nodes|add a node", re.IGNORECASE))
    search.fill(name)
    page.get_by_role("option").filter(has_text=name).first.click()
    page.wait_for_function("() => app.graph.nodes.some(n => n.subgraph && n.widgets?.length)")
    values = {"strength": 0.5} | ({"name": "horse"} if name == "Forget a Concept" else {})
    added = page.evaluate(CONNECT, values)
    assert added["title"] == name
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    page.screenshot(path=ARTEFACTS / f"blueprint {name}.png")
    enclosed = [item["inputs"] for key, item in prompt.items() if ":" in key]
    shown = dict(added["widgets"])
    assert list(shown) == SHOWN[name] and shown.items() >= values.items()
    for widget, value in shown.items():
        assert [inputs[widget] for inputs in enclosed if widget in inputs] == [value]
    outputs = server.run(prompt)
    assert server.image(outputs["6"]).shape == (128, 128, 3)
    told = "horse (object)" if name == "Forget a Concept" else "santa claus (identity)"
    assert f"forgets: {told}" in outputs["7"]["text"][0]
    assert page.fmn_errors == []
