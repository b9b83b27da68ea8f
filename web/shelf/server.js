// The routes of nodes/shelf.py.
import { api } from "../../../scripts/api.js";

const ROUTE = "/forget-me-not";

async function answerOf(response) {
  // A proxy or a stopped server may not answer with JSON.
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

/** All patches of the folders, as `Shelf.entries` in fmn/patches/library.py describes them. */
export async function patches() {
  return (await answerOf(await api.fetchApi(`${ROUTE}/shelf`, { cache: "no-store" }))).patches;
}

/** {family, base, sketch} of a checkpoint file; empty where the file does not say. */
export async function baseOf(kind, name) {
  const query = new URLSearchParams({ kind, name });
  return answerOf(await api.fetchApi(`${ROUTE}/base?${query}`));
}

/** Whether a patch's weights are not those of its record: true, false, or null if it does not say. */
export async function isChanged({ folder, name }) {
  const query = new URLSearchParams({ folder, name });
  return (await answerOf(await api.fetchApi(`${ROUTE}/shelf/changed?${query}`, { cache: "no-store" }))).changed;
}

/** The address of a thumbnail, which changes with the file. */
export function pictureOf({ folder, name, picture }) {
  return api.apiURL(`${ROUTE}/shelf/picture?${new URLSearchParams({ folder, name, v: picture })}`);
}

/** Run "rename", "delete" or "notes" on a patch; `keepalive`: even if the page is closed. */
export async function change(action, { folder, name }, more = {}, keepalive = false) {
  const response = await api.fetchApi(`${ROUTE}/shelf/${action}`, {
    method: "POST",
    keepalive,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ folder, name, ...more }),
  });
  return (await answerOf(response)).done;
}
