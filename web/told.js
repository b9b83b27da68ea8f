// Texts of nodes, below their widgets: how far a run is, and what there is to tell when it is done.
// ComfyUI's own texts are HTML or Markdown, and newer pages take them away when a run has ended.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Below, adopt, made } from "./below.js";

const EVENT = "forget-me-not.text";
const STYLE = `
.fmn-told { box-sizing: border-box; width: 100%; overflow: hidden; font: 12px/1.4 sans-serif;
  contain: inline-size; /* or Nodes 2.0 makes it as wide as its longest line */
  color: var(--input-text, #ddd); }
.fmn-told[hidden] { display: none; }
.fmn-told .fmn-content { max-height: 400px; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; user-select: text; cursor: text; }
`;
// The nodes that tell something. They get their place at once: what comes later to a node that a
// user has added, Nodes 2.0 of frontend 1.32.9 does not show.
const TELLERS = new Set([
  "FMN_ApplyForgetPatch", "FMN_ApplyGatedPatch", "FMN_AttentionMap", "FMN_ConceptBench",
  "FMN_ConceptInversionProbe", "FMN_EraseByNegativePrompt", "FMN_HardestEmbedding",
  "FMN_InspectForgetPatch", "FMN_MScore", "FMN_MergeForgetPatches", "FMN_SafeLatentDiffusion",
  "FMN_SaveForgetPatch", "FMN_TextualInversion", "FMN_TrainForgetPatches",
]);
const belows = new WeakMap(); // node -> Below

const unfinished = new Set(); // nodes that told how far they are, and not yet how it ended

function tell(node, text) {
  belows.get(node)?.fill(made("div", "", text));
}

function end(text) {
  for (const node of unfinished) tell(node, text);
  unfinished.clear();
}

const rootGraph = () => app.rootGraph ?? app.graph;

/** A node by the id that the server runs it under: "3", or "7:3" in the subgraph of node 7. */
function running(id) {
  let graph = rootGraph();
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/** A node by the id that the page keeps its output under: as above, or "GRAPH:3" in a subgraph. */
function nodeAt(locator) {
  const [id, name] = String(locator).split(":").reverse();
  const graph = rootGraph().subgraphs?.get(name);
  return graph ? graph.getNodeById(Number(id)) : running(locator);
}

/** Is an output one of another workflow, which has a node of the same number? */
function isElsewhere(output) {
  const { openWorkflows, activeWorkflow } = app.extensionManager.workflow;
  const owner = openWorkflows.find((workflow) =>
    Object.values(workflow.changeTracker?.nodeOutputs ?? {}).some((kept) => kept?.told === output.told),
  );
  return owner !== undefined && owner.path !== activeWorkflow?.path;
}

app.registerExtension({
  name: "forgetmenot.told",
  setup() {
    adopt(STYLE);
    api.addEventListener(EVENT, ({ detail: { node: id, workflow, text } }) => {
      if (workflow && workflow !== rootGraph().id) return;
      const node = running(id);
      if (!node) return;
      tell(node, text);
      unfinished.add(node);
    });
    api.addEventListener("execution_interrupted", () => end("cancelled"));
    api.addEventListener("execution_error", () => end("failed"));
    // Nothing runs, as after the server was restarted.
    api.addEventListener("status", ({ detail }) => {
      if (detail?.exec_info?.queue_remaining === 0) end("stopped");
    });
  },
  nodeCreated(node) {
    if (!TELLERS.has(node.comfyClass)) return;
    belows.set(node, new Below(node, { type: "FMN_TOLD", name: "fmn-told" }));
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      if (!output?.told) return;
      // The page notes whose output it is once all have heard of it.
      setTimeout(() => {
        if (isElsewhere(output)) return;
        unfinished.delete(this);
        tell(this, output.told.join("\n"));
      });
    };
  },
  // Another workflow was opened, or an earlier run's outputs were.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      if (output?.told) tell(nodeAt(locator), output.told.join("\n"));
    }
  },
});
