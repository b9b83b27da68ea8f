// Which bases the open graph loads, and whether a patch fits them.
import { app } from "../../../scripts/app.js";

import { baseOf } from "./server.js";

const FILES = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const DEMO = "FMN_LoadDemoCheckpoint";
const OTHER = "other"; // fmn/models/unknown_family.py
const NEVER = 2; // modes of a node: muted, bypassed
const BYPASSED = 4;
// From best to worst.
export const FITS = ["sameBase", "sameFamily", "unknown", "otherFamily"];

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? []) {
    if (node.mode === NEVER || node.mode === BYPASSED) continue;
    if (node.subgraph) yield* nodesOf(node.subgraph);
    else yield node;
  }
}

/** {kind, name} of the file a node loads; {} if it loads some other model; null if none. */
function loaded(node) {
  if (node.type === DEMO) return { kind: "demo", name: "" };
  if (!node.outputs?.some((output) => output.type === "MODEL")) return null;
  if (node.inputs?.some((input) => input.type === "MODEL")) return null;
  for (const [name, kind] of Object.entries(FILES)) {
    const widget = node.widgets?.find((each) => each.name === name);
    const linked = node.inputs?.some((input) => input.widget?.name === name && input.link != null);
    if (widget && !linked) return { kind, name: String(widget.value) };
  }
  return {};
}

/** What is loaded in the graph: [{kind, name}, ...] without doubles. */
export function loaders() {
  const found = [...nodesOf(app.graph)].map(loaded).filter((each) => each !== null);
  return [...new Map(found.map((each) => [JSON.stringify(each), each])).values()];
}

/** The same with what each file is: {kind, name, family, base}; empty where unknown. */
export function bases(found) {
  const nothing = { family: "", base: "" };
  return Promise.all(
    found.map(async (each) => {
      if (!each.kind) return { ...each, ...nothing };
      // A name in a workflow from elsewhere may be no file here, or a damaged one.
      const told = await baseOf(each.kind, each.name).catch(() => nothing);
      return { ...each, ...told };
    }),
  );
}

function fitOf(patch, base) {
  if (!patch.family || !base.family) return "unknown";
  if (patch.family !== base.family) return "otherFamily";
  if (patch.family === OTHER) return "unknown"; // the file does not tell which other
  return base.base && patch.base === base.base ? "sameBase" : "sameFamily";
}

/** One of FITS: the best over all bases of the graph. */
export function fit(patch, known) {
  const each = known.map((base) => fitOf(patch, base));
  return FITS.find((name) => each.includes(name)) ?? "unknown";
}
