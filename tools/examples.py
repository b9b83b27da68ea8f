"""Make the example workflows anew: their .json as the frontend saves them, and a .jpg of each.
Also the subgraph blueprints.

    COMFYUI_PATH=... python tools/examples.py [NAME ...]

Starts ComfyUI, puts each workflow together in its page in Chromium, saves what the page would save,
runs it, and takes a picture. Widgets are stored by position: after a change of a node's widgets,
run this. ``tools/flows`` holds what is put together. It needs what ``tools/run.py tests`` needs.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.comfyui.conftest import comfyui_path, make_base  # noqa: E402
from tests.comfyui.frontend import at_rest, launched, opened  # noqa: E402
from tests.comfyui.server import Server  # noqa: E402
from tools.flows import BLUEPRINTS, EXAMPLES  # noqa: E402

FOLDER = ROOT / "example_workflows"
BLUEPRINT_FOLDER = ROOT / "subgraphs"
VIEW = {"width": 1600, "height": 1000}
SLOW = 240_000  # ms, for a page on a busy machine
# Pixels below a node's widgets for what it shows once it has run; our own nodes ask for theirs, and
# a training without previews needs less.
ROOM = {"PreviewImage": 330, "FMN_TrainForgetPatch": 330}
# Pixels that a widget is higher in Nodes 2.0, and a node with its pack's name or a picture's size.
TALLER, NAMED = 4, 34
LAYOUT = """
([graph, columns, titles, note, room, widths, taller, named]) => {
  app.loadApiJson(graph, 'example');
  const byId = id => app.graph.getNodeById(id) ?? app.graph.getNodeById(String(id));
  let x = 0;
  for (const column of columns) {
    let y = 0, width = 0;
    for (const id of column) {
      let node;
      if (id === 0) {
        node = LiteGraph.createNode('MarkdownNote');
        app.graph.add(node);
        node.title = 'What this shows';
        node.widgets[0].value = note;
        node.setSize([330, 30 + 24 * Math.ceil(note.length / 42)]);
      } else {
        node = byId(id);
        const size = node.computeSize();
        const own = node.widgets?.find(widget => widget.type?.startsWith('FMN_'))?.options.room;
        const below = room[node.type] ?? own ?? 0;
        node.setSize([Math.max(size[0], widths[id] ?? 310), size[1] + below]);
        node.title = titles[id] ?? node.constructor.title;
        for (const widget of node.widgets ?? [])
          if (widget.name === 'control_after_generate') widget.value = 'fixed';
      }
      node.pos = [x, y];
      y += node.size[1] + 60 + taller * (node.widgets?.length ?? 0);
      const isBare = !node.widgets?.some(widget => widget.options?.room);
      if (node.type.startsWith('FMN_') && isBare || node.type === 'PreviewImage') y += named;
      width = Math.max(width, node.size[0]);
    }
    x += width + 50;
  }
  app.graph.setDirtyCanvas(true, true);
}
"""
# As the frontend does when it publishes a subgraph.
ENCLOSE = """
([numbers, widgets, description]) => {
  const enclosed = new Set(numbers.map(id => app.graph.getNodeById(id)));
  const { node } = app.graph.convertToSubgraph(enclosed);
  node.properties.proxyWidgets = [];  // it would name inner nodes, which newer pages renumber
  for (const [id, name] of widgets) {
    const inner = node.subgraph.nodes.find(each => each.id == id);
    const slot = inner.inputs.find(each => each.widget?.name === name);
    node.subgraph.addInput(name, String(slot.type)).connect(slot, inner);
  }
  node.pos = [0, 0];
  node.setSize(node.computeSize());
  const { nodes, subgraphs } = app.canvas._serializeItems([node]);
  return JSON.stringify({
    revision: 0, last_node_id: node.id, last_link_id: 0, nodes, links: [], version: 0.4,
    definitions: { subgraphs }, extra: { BlueprintDescription: description },
  });
}
"""
# All of it in view, or of a large one the beginning: below SMALLEST the page draws no texts.
SMALLEST = 0.65
FIT = """
smallest => {
  const nodes = app.graph.nodes;
  const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
  const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
  const view = app.canvas.canvas.getBoundingClientRect();
  const fitting = Math.min((view.width - 120) / right, (view.height - 200) / (bottom + 40), 1);
  const scale = Math.max(fitting, smallest);
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [80 / scale, 130 / scale];
  app.canvas.setDirty(true, true);
}
"""


def lay_out(page, flow):
    titles, widths = ({str(n): value for n, value in d.items()} for d in (flow.titles, flow.widths))
    room = ROOM | flow.room
    layout = [flow.nodes, flow.columns, titles, flow.note, room, widths, TALLER, NAMED]
    page.evaluate(LAYOUT, layout)


def make(page, server, name, flow):
    """Write the .json and the .jpg of one example."""
    lay_out(page, flow)
    page.evaluate(FIT, SMALLEST)
    at_rest(page)
    saved = json.loads(page.evaluate("JSON.stringify(app.graph.serialize())"))
    if flow.form:
        saved["extra"]["linearData"] = flow.form
    del saved["id"]  # each opening gets its own, or the page would show an earlier one's curves
    (FOLDER / f"{name}.json").write_text(json.dumps(saved) + "\n", encoding="utf-8")
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    outputs = server.run(prompt)
    previews = {
        node["title"]: outputs[str(node["id"])]
        for node in saved["nodes"]
        if node["type"] == "PreviewImage"
    }
    pictures = {title: server.image(output) for title, output in previews.items()}
    thumbnail(pictures, flow.rows, flow.height).save(FOLDER / f"{name}.jpg", quality=88)


def make_blueprint(page, name, flow):
    """Write the .json of one blueprint."""
    lay_out(page, flow)
    saved = json.loads(page.evaluate(ENCLOSE, [flow.enclosed, flow.promoted, flow.note]))
    saved["nodes"][0]["title"] = saved["definitions"]["subgraphs"][0]["name"] = name
    BLUEPRINT_FOLDER.mkdir(exist_ok=True)
    (BLUEPRINT_FOLDER / f"{name}.json").write_text(json.dumps(saved) + "\n", encoding="utf-8")


def thumbnail(pictures, rows, height):
    """The first picture of every preview with its title, column by column, all as high."""
    font, images = ImageFont.load_default(14), []
    for title, pixels in pictures.items():
        picture = Image.fromarray((pixels * 255).round().astype("uint8"))
        width = height * picture.width // picture.height
        images.append((title, picture.resize((width, height))))
    columns = [images[i : i + rows] for i in range(0, len(images), rows)]
    widths = [max(picture.width for _, picture in column) for column in columns]
    sheet = Image.new(
        "RGB", (sum(widths) + 8 * len(columns) + 8, rows * (height + 30) + 8), "white"
    )
    draw, left = ImageDraw.Draw(sheet), 8
    for column, width in zip(columns, widths):
        for i, (title, picture) in enumerate(column):
            draw.text((left, i * (height + 30) + 8), title, "black", font=font)
            sheet.paste(picture, (left, i * (height + 30) + 30))
        left += width + 8
    return sheet


def main(names):
    known = EXAMPLES | BLUEPRINTS
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"There is no example '{unknown[0]}': use {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        with (
            Server(comfyui_path(), base) as server,
            sync_playwright() as playwright,
            launched(playwright.chromium, Path(folder) / "browser") as browser,
        ):
            page = opened(browser, server.url)
            page.set_viewport_size(VIEW)
            page.set_default_timeout(SLOW)
            for name in names or known:
                if name in EXAMPLES:
                    make(page, server, name, EXAMPLES[name]())
                else:
                    make_blueprint(page, name, BLUEPRINTS[name]())
                print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
