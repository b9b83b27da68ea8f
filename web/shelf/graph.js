// Adds patches to the graph: a Load and an Apply node, connected.
import { app } from "../../../scripts/app.js";

const LOAD = "FMN_LoadForgetPatch";
const APPLY = "FMN_ApplyForgetPatch";
const GAP = 40;
const STEP = 30; // pixels from one pair of nodes to the next, right and down
export const DRAGGED = "application/x-forget-patch";

/** Folder and path of a patch as one string. */
export const keyOf = ({ folder, name }) => `${folder}/${name}`;

/** Near the middle of the view, but not on top of another node. */
function freePlace(graph) {
  const { left, top, width, height } = app.canvas.canvas.getBoundingClientRect();
  let [x, y] = app.clientPosToCanvasPos([left + width / 2, top + height / 3]);
  // A node may have snapped to the grid.
  const isNear = ({ pos }) => Math.max(Math.abs(pos[0] - x), Math.abs(pos[1] - y)) < STEP / 2;
  while (graph.nodes.some(isNear)) {
    x += STEP;
    y += STEP;
  }
  return [x, y];
}

function chooseFile(node, name) {
  const widget = node.widgets.find((each) => each.name === "file");
  const known = widget.options.values ?? [];
  // Windows lists names with backslashes; files made since the page was loaded are not listed.
  const listed = known.find((value) => String(value).replaceAll("\\", "/") === name);
  if (listed === undefined) widget.options.values = [...known, name];
  widget.value = listed ?? name;
  widget.callback?.(widget.value);
}

/** Add both nodes to the open graph at a place [x, y] in it, as one step to undo. */
export function addPatch(patch, wanted = null) {
  const graph = app.canvas.graph ?? app.graph;
  const place = wanted ?? freePlace(graph);
  app.canvas.emitBeforeChange();
  try {
    const load = window.LiteGraph.createNode(LOAD);
    const apply = window.LiteGraph.createNode(APPLY);
    load.pos = [place[0], place[1]];
    chooseFile(load, patch.name); // before it is added: Nodes 2.0 reads the options only then
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

/** Accept patches dropped on the canvas. `entryOf` gives the patch with a key, or nothing. */
export function acceptDrops(entryOf) {
  const canvas = app.canvas.canvas;
  canvas.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes(DRAGGED)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
  });
  canvas.addEventListener("drop", (event) => {
    // Anything may be dragged here from other pages: only patches on the shelf count.
    const patch = entryOf(event.dataTransfer.getData(DRAGGED));
    if (!patch || patch.problem) return;
    event.preventDefault();
    event.stopPropagation();
    addPatch(patch, app.clientPosToCanvasPos([event.clientX, event.clientY]));
  });
}
