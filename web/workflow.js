// Which workflow an event of the server belongs to.

import { app } from "../../scripts/app.js";

export const NO_ID = "00000000-0000-0000-0000-000000000000"; // nodes/page.py

export const rootGraph = () => app.rootGraph ?? app.graph;

/** [execution id, node] of every node of a graph and its subgraphs. */
export function* allNodes(graph, prefix = "") {
  for (const node of graph?.nodes ?? []) {
    const id = `${prefix}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* allNodes(node.subgraph, `${id}:`);
  }
}

/**
 * Is the workflow of an event open? One that was opened from an API file has no id of its own, and
 * newer frontends give it another whenever they load it: then its nodes decide.
 */
export function isOpen({ workflow, nodes = [] }) {
  const root = rootGraph();
  if (!workflow || workflow === root.id) return true;
  if (workflow !== NO_ID) return false;
  const open = new Set([...allNodes(root)].map(([id, node]) => `${id} ${node.type}`));
  return nodes.length > 0 && nodes.every((each) => open.has(each));
}
