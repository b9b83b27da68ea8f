// The text below a node's widgets: progress while it runs, then its result.
// ComfyUI's own text widgets show HTML or Markdown, and newer pages remove them when a run ends.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { NodeElement, addStyles, element } from "./node_element.js";
import { isOpen, rootGraph } from "./workflow.js";

const EVENT = "forget-me-not.text";
const STYLE = `
.fmn-node-text { box-sizing: border-box; width: 100%; overflow: hidden; font: 12px/1.4 sans-serif;
  contain: inline-size; /* or Nodes 2.0 makes it as wide as its longest line */
  color: var(--input-text, #ddd); }
.fmn-node-text[hidden] { display: none; }
.fmn-node-text .fmn-content { max-height: 400px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; cursor: text; }
`;
// Nodes with a text, and how high it usually is, in pixels. They get its element when they are
// created: Nodes 2.0 of frontend 1.32.9 does not show elements that are added to a node later.
const NODES_WITH_TEXT = new Map(Object.entries({
  FMN_ApplyForgetPatch: 60, FMN_ApplyGatedPatch: 60, FMN_AttentionMap: 120,
  FMN_CompareBeforeAfter: 130, FMN_ConceptBench: 220, FMN_ConceptInversionProbe: 330,
  FMN_EraseByNegativePrompt: 60, FMN_HardestEmbedding: 120, FMN_ImportEraser: 120,
  FMN_InspectForgetPatch: 320, FMN_MScore: 120, FMN_MergeForgetPatches: 80,
  FMN_SafeLatentDiffusion: 60, FMN_SaveForgetPatch: 70, FMN_TextualInversion: 120,
  FMN_TrainForgetPatches: 150,
}));
const MIN_WIDTH = 300; // of a new node, in pixels: shorter lines would make it higher
const elements = new WeakMap(); // node -> NodeElement
const unfinished = new Set(); // nodes that show progress, and no result yet

function showText(node, text) {
  elements.get(node)?.fill(element("div", "", text));
}

function endUnfinished(text) {
  for (const node of unfinished) showText(node, text);
  unfinished.clear();
}

/** The node with the id that the server runs it under: "3", or "7:3" in the subgraph of node 7. */
function nodeByExecutionId(id) {
  let graph = rootGraph();
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/** The node with the id that the page keeps its output under: as above, or "GRAPH:3" in a subgraph. */
function nodeByOutputId(locator) {
  const [id, name] = String(locator).split(":").reverse();
  const graph = rootGraph().subgraphs?.get(name);
  return graph ? graph.getNodeById(Number(id)) : nodeByExecutionId(locator);
}

/** Does an output belong to another workflow, with a node of the same number? */
function isOfAnotherWorkflow(output) {
  const { openWorkflows, activeWorkflow } = app.extensionManager.workflow;
  const owner = openWorkflows.find(({ changeTracker }) =>
    Object.values(changeTracker?.nodeOutputs ?? {}).some((kept) => kept?.node_text === output.node_text),
  );
  return owner !== undefined && owner.path !== activeWorkflow?.path;
}

app.registerExtension({
  name: "forgetmenot.node_text",
  setup() {
    addStyles(STYLE);
    api.addEventListener(EVENT, ({ detail }) => {
      const node = isOpen(detail) && nodeByExecutionId(detail.node);
      if (!node) return;
      showText(node, detail.text);
      unfinished.add(node);
    });
    api.addEventListener("execution_interrupted", () => endUnfinished("cancelled"));
    api.addEventListener("execution_error", () => endUnfinished("failed"));
    // Nothing is running, for example because the server was restarted.
    api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) endUnfinished("stopped");
    });
  },
  nodeCreated(node) {
    const room = NODES_WITH_TEXT.get(node.comfyClass);
    if (!room) return;
    const options = { type: "FMN_NODE_TEXT", className: "fmn-node-text", minWidth: MIN_WIDTH, room };
    elements.set(node, new NodeElement(node, options));
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (!output?.node_text) return;
      // Only after this event does the page note which workflow the output belongs to.
      setTimeout(() => {
        if (isOfAnotherWorkflow(output)) return;
        unfinished.delete(this);
        showText(this, output.node_text.join("\n"));
      });
    };
  },
  // The page shows the outputs of another workflow, or of an earlier run.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      if (output?.node_text) showText(nodeByOutputId(locator), output.node_text.join("\n"));
    }
  },
});
