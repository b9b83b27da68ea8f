// The bases that the open graph loads, and whether a patch fits them.
import { app } from "../../../scripts/app.js";

import { baseOf } from "./server.js";

const FILES = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const DEMO = "FMN_LoadDemoCheckpoint";
const OTHER = "other"; // fmn/models/unknown_family.py
const NEAR = 0.08; // fmn/patches/metadata.py
const NEVER = 2; // modes of a node: muted, bypassed
const BYPASSED = 4;
// Best first.
export const FITS = ["sameBase", "sameFamily", "unknown", "otherFamily"];

function* nodesOf(graph) {
  for (const node of graph?.nodes ?? []) {
    if (node.mode === NEVER || node.mode === BYPASSED) continue;
    if (node.subgraph) yield* nodesOf(node.subgraph);
    else yield node;
  }
}

/** {kind, name} of the file that a node loads; {} for an unknown loader; null for other nodes. */
function loadedFile(node) {
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

/** The files that the graph loads: [{kind, name}, ...] without duplicates. */
export function loadedFiles() {
  const files = [...nodesOf(app.graph)].map(loadedFile).filter((each) => each !== null);
  return [...new Map(files.map((file) => [JSON.stringify(file), file])).values()];
}

/** The same with family and base of each: {kind, name, family, base, sketch}; empty where unknown. */
export function basesOf(files) {
  const nothing = { family: "", base: "", sketch: [] };
  return Promise.all(
    files.map(async (file) => {
      if (!file.kind) return { ...file, ...nothing };
      // A workflow may name a file that is missing or damaged here.
      const base = await baseOf(file.kind, file.name).catch(() => nothing);
      return { ...file, ...base };
    }),
  );
}

function fitOf(patch, base) {
  if (!patch.family || !base.family) return "unknown";
  if (patch.family !== base.family) return "otherFamily";
  if (patch.family === OTHER) return "unknown"; // the file does not say which model
  const same = base.base && (patch.base === base.base || distance(patch, base) < NEAR);
  return same ? "sameBase" : "sameFamily";
}

/** Of the sketches of two bases: about the relative difference of their weights. */
function distance({ sketch: one = [] }, { sketch: two = [] }) {
  if (!one.length || one.length !== two.length) return Infinity;
  return Math.hypot(...one.map((number, index) => number - two[index])) / Math.sqrt(one.length);
}

/** One of FITS: the best over all bases of the graph. */
export function fit(patch, bases) {
  const fits = bases.map((base) => fitOf(patch, base));
  return FITS.find((name) => fits.includes(name)) ?? "unknown";
}
