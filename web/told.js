// The text that a node has to tell once it has run, below its widgets. ComfyUI's own texts, which
// nodes show while they run, are gone from newer pages when the run has ended.

import { app } from "../../scripts/app.js";
import { Below, made } from "./below.js";

const STOCK = "$$node-text-preview";
const STYLE = `
.fmn-told { box-sizing: border-box; width: 100%; overflow: hidden; font: 12px/1.4 sans-serif;
  contain: inline-size; /* or Nodes 2.0 makes it as wide as its longest line */
  color: var(--input-text, #ddd); }
.fmn-told[hidden] { display: none; }
.fmn-told .fmn-content { max-height: 400px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; cursor: text; }
`;
const belows = new WeakMap(); // node -> Below

function tell(node, text) {
  if (!belows.has(node)) {
    belows.set(node, new Below(node, { type: "FMN_TOLD", name: "fmn-told", style: STYLE }));
  }
  belows.get(node).fill(made("div", "", text));
  const at = node.widgets.findIndex((widget) => widget.name === STOCK);
  if (at >= 0) {
    node.widgets[at].onRemove?.();
    node.widgets.splice(at, 1);
  }
}

/** A node by the id that the page keeps its output under: "3", or "GRAPH:3" in a subgraph. */
function nodeAt(locator) {
  const [id, graph] = String(locator).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  return (graph ? root.subgraphs?.get(graph) : root)?.getNodeById(Number(id));
}

app.registerExtension({
  name: "forgetmenot.told",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("FMN_")) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (output?.told) tell(this, output.told.join("\n"));
    };
  },
  // Another workflow was opened, or an earlier run's outputs were.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      if (!output?.told) continue;
      const node = nodeAt(locator);
      if (node?.comfyClass?.startsWith("FMN_")) tell(node, output.told.join("\n"));
    }
  },
});
