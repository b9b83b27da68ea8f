"""What nodes look like in both renderers, in Chromium: colours of sockets, lines of text."""

import pytest

from .frontend import ARTEFACTS, at_rest, dress, open_prompt
from .workflows import demo_loader, node, saving, training

OURS = """() => [...new Set(Object.entries(LiteGraph.registered_node_types)
  .filter(([name]) => name.startsWith('FMN_'))
  .flatMap(([, {nodeData}]) => [...nodeData.output, ...Object.values(nodeData.input)
    .flatMap(part => Object.values(part).map(([type]) => type))])
  .filter(type => /^(FMN|FORGET)_/.test(type)))]"""
# Colours of a type: of a socket with and without a link, of a link, and in Nodes 2.0.
COLOURS = """type => {
  const probe = document.createElement('i');
  probe.style.backgroundColor = `var(--color-datatype-${type})`;
  document.body.append(probe);
  const dot = getComputedStyle(probe).backgroundColor;
  probe.style.backgroundColor = app.canvas.colourGetter.getConnectedColor(type);
  const on = getComputedStyle(probe).backgroundColor;
  probe.style.backgroundColor = app.canvas.colourGetter.getDisconnectedColor(type);
  const off = getComputedStyle(probe).backgroundColor;
  probe.style.backgroundColor = LGraphCanvas.link_type_colors[type];
  const link = getComputedStyle(probe).backgroundColor;
  probe.remove();
  return [on, off, link, dot];
}"""
DOTS = """() => [...document.querySelectorAll('.slot-dot')]
  .filter(e => /--color-datatype-(FMN|FORGET)_/.test(e.style.backgroundColor))
  .map(e => getComputedStyle(e).backgroundColor)"""
CLEAR = "rgba(0, 0, 0, 0)"
ATTACK = (
    '<img src="x" onerror="fmnAttacked = 1"> **bold** ![pixel](http://127.0.0.1:9/pixel.png) '
    "WWW.pixel.org me@pixel.org"
)


def test_all_our_types_have_a_colour_in_every_theme(page):
    types = page.evaluate(OURS)
    assert len(types) > 5
    for palette in ("dark", "light", "dark"):
        dress(page, False, palette)
        found = {type: set(page.evaluate(COLOURS, type)) for type in types}
        assert all(len(colours) == 1 for colours in found.values()), found
        assert len(set.union(*found.values()) - {CLEAR}) == len(types)
    assert page.evaluate(COLOURS, "FMN_NOTHING")[3] == CLEAR  # so a type without one would be seen
    # A palette of the user's goes first.
    page.evaluate("app.canvas.default_connection_color_byType.FMN_KEEP = 'rgb(1, 2, 3)'")
    assert page.evaluate(COLOURS, "FMN_KEEP")[0] == "rgb(1, 2, 3)"
    page.evaluate("app.canvas.default_connection_color_byType.FMN_KEEP = ''")
    assert page.fmn_errors == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_lines_stay_lines_and_signs_stay_signs(page, server, nodes_2):
    """Inspect Forget Patch tells several lines, with a stranger's words in them."""
    trained = demo_loader() | training(ATTACK, training_seed=41 + nodes_2, steps=2)
    made = server.run(trained | saving("attack"))
    graph = {
        "1": node("FMN_LoadForgetPatch", file=made["save"]["text"][0]),
        "2": node("FMN_InspectForgetPatch", patch=["1", 0]),
    }
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.fmn_errors.clear()
    dress(page, nodes_2)
    open_prompt(page, graph, nodes_2)
    page.get_by_test_id("queue-button").click()
    text = page.get_by_text("forgets: <img src=").first
    text.wait_for()
    lines = [line.strip() for line in text.inner_text().splitlines()]
    assert lines[0] == f"forgets: {ATTACK} (object)"
    assert [line.split(":")[0] for line in lines[1:4]] == ["for", "layers", "method"]
    page.evaluate("app.graph.nodes[1].setSize([420, 420]); app.graph.setDirtyCanvas(true, true)")
    at_rest(page)
    page.screenshot(path=ARTEFACTS / f"inspect {'nodes 2' if nodes_2 else 'classic'}.png")
    if nodes_2:
        dots = page.evaluate(DOTS)
        assert dots and CLEAR not in dots
    assert not [url for url in asked if "pixel" in url]
    assert page.locator("a[href*=pixel]").count() == 0
    assert not page.evaluate("window.fmnAttacked")
    assert page.fmn_errors == []
    dress(page, False)
