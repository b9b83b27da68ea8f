"""Templates in a page of the frontend: opened by their card, run by its button, measured."""

from contextlib import suppress

from playwright.sync_api import TimeoutError

from .frontend import ARTEFACTS, all_nodes, another_workflow, at_rest

# Sets {type: {widget: value}}. Not by widget.callback: Nodes 2.0 of frontend 1.32.9 shows no text
# that comes to a node after its widgets were changed so.
SET = """wanted => {
  for (const node of app.graph.nodes)
    for (const widget of node.widgets ?? []) {
      const value = wanted[node.type]?.[widget.name];
      if (value !== undefined) widget.value = value;
    }
}"""
# What looks wrong, in words: nodes over each other, out of sight, and what sticks out of its node.
FAULTS = """() => {
  const found = [], scale = app.canvas.ds.scale, nodes = app.graph.nodes;
  const element = node => document.querySelector(`[data-node-id="${node.id}"]`);
  const box = node => {
    const { x, y, width, height } = element(node)?.getBoundingClientRect() ?? {};
    return element(node) ? [x, y, width, height] : [...node.boundingRect];
  };
  const boxes = nodes.map(box);
  boxes.forEach(([x, y, w, h], i) => boxes.slice(0, i).forEach(([x2, y2, w2, h2], j) => {
    if (x < x2 + w2 && x2 < x + w && y < y2 + h2 && y2 < y + h)
      found.push(`${nodes[i].title} lies over ${nodes[j].title}`);
  }));
  const edge = 3 * scale;
  nodes.forEach((node, i) => {
    const [x, y, width, height] = boxes[i];
    if (element(node) && (x < 0 || y < 0 || x + width > innerWidth || y + height > innerHeight))
      found.push(`${node.title} is out of sight`);
    for (const widget of element(node) ? [] : node.widgets ?? [])
      if (widget.y + (widget.computedHeight ?? 20) > node.size[1] + 1)
        found.push(`${widget.name} sticks out of ${node.title}`);
    const inside = [...(element(node)?.querySelectorAll('.lg-node-widget, img, textarea') ?? [])];
    for (const each of inside) {
      const b = each.getBoundingClientRect();
      if (b.height && (b.bottom > y + height + edge || b.right > x + width + edge))
        found.push(`${each.tagName} sticks out of ${node.title}`);
    }
  });
  return found;
}"""
# Widths of our nodes. In Nodes 2.0 the page makes room for pictures below.
SIZES = """() => app.graph.nodes.filter(node => node.type.startsWith('FMN_'))
  .map(node => [node.title, Math.round(node.size[0])])"""
# Of every node, how many pictures and how many texts can be seen.
PICTURES = """() => Object.fromEntries(app.graph.nodes.map(node => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  const images = element ? [...element.querySelectorAll('img')] : node.imgs ?? [];
  return [node.id, images.filter(image => image.complete && image.naturalWidth > 100).length];
}))"""
TEXTS = """() => Object.fromEntries(app.graph.nodes.map(node => {
  const view = node.widgets?.find(widget => widget.type === 'FMN_TRAIN_LIVE')?.element;
  if (view) return [node.id, view.innerText.startsWith('done: ') ? 1 : 0];
  const told = node.widgets?.find(widget => widget.type === 'FMN_NODE_TEXT')?.element;
  return [node.id, told?.isConnected && told.querySelector('.fmn-content').innerText ? 1 : 0];
}))"""


def choose_template(page, name):
    """As users do it: the Templates browser, and a click on the card."""
    page.get_by_role("button", name="Templates").click()
    dialog = page.get_by_role("dialog")
    with another_workflow(page):
        dialog.get_by_text(name, exact=True).first.click()
    dialog.wait_for(state="detached")


def drawn(page, nodes_2):
    """Wait until all nodes are on the page, and bring them into sight.

    In Nodes 2.0 they are in sight as templates open, and the view is left alone: frontend 1.32.9
    misplaces a node whose size changes while the view glides (it reads the node's place from the
    page, one frame behind the canvas), and some nodes get their last size half a second late.
    """
    all_nodes(page, nodes_2)
    if not nodes_2:
        page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    at_rest(page)  # it glides there


def run(page, server):
    """Press Run; (what the server kept of it, nodes that came from the cache, seconds)."""
    with page.expect_response(lambda response: response.url.endswith("/prompt")) as posted:
        page.get_by_test_id("queue-button").click()
    told = server.history(posted.value.json()["prompt_id"], patience=300)
    messages = dict(told["status"]["messages"])
    assert told["status"]["status_str"] == "success", messages
    times = [messages[name]["timestamp"] for name in ("execution_start", "execution_success")]
    return told, messages["execution_cached"]["nodes"], (times[1] - times[0]) / 1000


def seen(page, counts, wanted):
    """Wait until ``counts`` gives what is wanted of each node: {id: number}."""
    missing = f"""wanted => {{ const seen = ({counts})();
      return Object.keys(wanted).filter(id => seen[id] !== wanted[id]); }}"""
    page.wait_for_function(f"wanted => !({missing})(wanted).length", arg=wanted)


def faults(page):
    """What still looks wrong when the page has had time to draw, best nothing."""
    with suppress(TimeoutError):
        page.wait_for_function(f"() => !({FAULTS})().length", timeout=20_000)
    return page.evaluate(FAULTS)


def photograph(page, name):
    page.screenshot(path=ARTEFACTS / f"{name}.jpg", type="jpeg", quality=85)
