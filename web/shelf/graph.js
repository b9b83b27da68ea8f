// Patches into the graph: a Load and an Apply node, connected.
import { app } from "../../../scripts/app.js";

const LOAD = "FMN_LoadForgetPatch";
const APPLY = "FMN_ApplyForgetPatch";
const GAP = 40;
const STEP = 30; // from one pair to the next, both ways
export const DRAGGED = "application/x-forget-patch";

/** Folder and path of a patch as one text. */
export const keyOf = ({ folder, name }) => `${folder}/${name}`;

/** In the middle of what is seen, but not on a node that was put there before. */
function freePlace(graph) {
  const { left, top, width, height } = app.canvas.canvas.getBoundingClientRect();
  let [x, y] = app.clientPosToCanvasPos([left + width / 2, top + height / 3]);
  // A node may have been moved a little, to the grid.
  const isNear = ({ pos }) => Math.max(Math.abs(pos[0] - x), Math.abs(pos[1] - y)) < STEP / 2;
  while (graph.nodes.some(isNear)) {
    x += STEP;
    y += STEP;
  }
  return [x, y];
}

function choose(node, name) {
  const widget = node.widgets.find((each) => each.name === "file");
  const known = widget.options.values ?? [];
  // Windows lists names with backslashes; a file made since the page was loaded is not listed.
  const listed = known.find((value) => String(value).replaceAll("\\", "/") === name);
  if (listed === undefined) widget.options.values = [...known, name];
  widget.value = listed ?? name;
  widget.callback?.(widget.value);
}

/** Add both nodes to the graph that is open, at a place in it; one step to undo. */
export function addPatch(patch, where = null) {
  const graph = app.canvas.graph ?? app.graph;
  const place = where ?? freePlace(graph);
  app.canvas.emitBeforeChange();
  try {
    const load = window.LiteGraph.createNode(LOAD);
    const apply = window.LiteGraph.createNode(APPLY);
    load.pos = [place[0], place[1]];
    choose(load, patch.name); // before it is added: Nodes 2.0 reads the options only then
    graph.add(load);
    apply.pos = [place[0] + load.size[0] + GAP, place[1]];
    graph.add(apply);
    load.connect(0, apply, apply.findInputSlot("patch"));
    app.canvas.selectItems?.([load, apply]);
    return [load, apply];
  } finally {
    app.canvas.emitAfterChange();
    graph.setDirtyCanvas(true, true);
  }
}

/** Let patches be dropped on the canvas. `entryOf` gives the patch of a key, or nothing. */
export function acceptDrops(entryOf) {
  const canvas = app.canvas.canvas;
  canvas.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes(DRAGGED)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
  });
  canvas.addEventListener("drop", (event) => {
    // Another page may drag anything here: only what is on the shelf counts.
    const patch = entryOf(event.dataTransfer.getData(DRAGGED));
    if (!patch || patch.problem) return;
    event.preventDefault();
    event.stopPropagation();
    addPatch(patch, app.clientPosToCanvasPos([event.clientX, event.clientY]));
  });
}
