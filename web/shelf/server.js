// The routes of nodes/shelf.py.
import { api } from "../../../scripts/api.js";

const ROUTE = "/forget-me-not";

async function answerOf(response) {
  // A proxy or a stopped server answers with something else than JSON.
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `${response.status} ${response.statusText}`);
  return answer;
}

/** All patches of the folders, as `Shelf.entries` in fmn/patches/library.py describes them. */
export async function patches() {
  return (await answerOf(await api.fetchApi(`${ROUTE}/shelf`, { cache: "no-store" }))).patches;
}

/** What a checkpoint file is: {family, base}, empty where the file does not tell. */
export async function baseOf(kind, name) {
  const query = new URLSearchParams({ kind, name });
  return answerOf(await api.fetchApi(`${ROUTE}/base?${query}`));
}

/** The address of a thumbnail; it changes with the file. */
export function pictureOf({ folder, name, picture }) {
  return api.apiURL(`${ROUTE}/shelf/picture?${new URLSearchParams({ folder, name, v: picture })}`);
}

/** Ask for "rename", "delete" or "notes" of a patch; `keepalive`: even if the page is left. */
export async function change(what, { folder, name }, more = {}, keepalive = false) {
  const response = await api.fetchApi(`${ROUTE}/shelf/${what}`, {
    method: "POST",
    keepalive,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ folder, name, ...more }),
  });
  return (await answerOf(response)).done;
}
