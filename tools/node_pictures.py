"""Make the pictures of the nodes on their help pages anew: web/docs/images/NODE.png.

    COMFYUI_PATH=... python tools/node_pictures.py [NODE ...]

Starts ComfyUI, puts each node alone on the canvas of its page in Chromium, as it is when a user
adds it, and takes a picture. After a change of a node's widgets, run this. It needs what
``tools/run.py tests`` needs.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.comfyui.conftest import comfyui_path, make_base  # noqa: E402
from tests.comfyui.frontend import at_rest, launched, opened  # noqa: E402
from tests.comfyui.server import Server  # noqa: E402

FOLDER = ROOT / "web" / "docs" / "images"
SETTINGS = {
    "Comfy.VueNodes.Enabled": False,
    "Comfy.ColorPalette": "dark",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",  # the pack's name above each title
}
PREPARE = """
async settings => {
  for (const [name, value] of Object.entries(settings))
    await app.extensionManager.setting.set(name, value);
  app.canvas.background_image = null;  // the grid
}
"""
NAMES = """
Object.keys(LiteGraph.registered_node_types).filter(name => name.startsWith('FMN_')).sort()
"""
# Returns the node's place on the page; sharp enough at 1.25, and the tallest node fits.
ADD = """
name => {
  app.graph.clear();
  const node = LiteGraph.createNode(name), scale = 1.25, margin = 10;
  app.graph.add(node);
  const size = node.computeSize();
  node.setSize([Math.max(size[0], 320), size[1]]);
  node.pos = [0, 0];
  const view = app.canvas.canvas.getBoundingClientRect();
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [400 / scale, 130 / scale];
  app.canvas.setDirty(true, true);
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  return {
    x: view.x + 400 - margin, y: view.y + 130 - title * scale - margin,
    width: node.size[0] * scale + 2 * margin,
    height: (node.size[1] + title) * scale + 2 * margin,
  };
}
"""


def picture(page, name):
    """One node as a small PNG."""
    place = page.evaluate(ADD, name)
    bottom = place["y"] + place["height"]
    if bottom > page.viewport_size["height"]:
        sys.exit(f"{name} does not fit on the page: it ends at {bottom:.0f} pixels.")
    at_rest(page)  # text fields follow their node
    shot = Image.open(io.BytesIO(page.screenshot(clip=place))).convert("RGB")
    return with_palette(np.asarray(shot))


def with_palette(pixels):
    """The picture with the 256 colours of [H, W, 3] that most pixels have, and these exactly.

    What else there is, a few pixels at the edges of letters, gets the nearest of them.
    """
    height, width, _ = pixels.shape
    colours, which, counts = np.unique(
        pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    kept = colours[np.argsort(-counts, kind="stable")[:256]]
    distances = ((colours[:, None].astype(int) - kept.astype(int)) ** 2).sum(-1)
    picture = Image.fromarray(
        distances.argmin(1)[which].reshape(height, width).astype(np.uint8), "P"
    )
    picture.putpalette(kept.tobytes())
    return picture


def main(names):
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        with (
            Server(comfyui_path(), base) as server,
            sync_playwright() as playwright,
            launched(playwright.chromium, Path(folder) / "browser") as browser,
        ):
            page = opened(browser, server.url)
            page.evaluate(PREPARE, SETTINGS)
            known = page.evaluate(NAMES)
            unknown = [name for name in names if name not in known]
            if unknown:
                sys.exit(f"There is no node '{unknown[0]}': use {', '.join(known)}.")
            for name in names or known:
                path = FOLDER / f"{name}.png"
                picture(page, name).save(path, optimize=True)
                print(f"{name}: {path.stat().st_size / 1000:.1f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
