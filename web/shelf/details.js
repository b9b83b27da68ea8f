// Details of the selected patch, and buttons to use and change it.
import { button, make } from "./dom.js";
import { badge, dateOf, familyOf, sizeOf, thumbnail, titleOf, wordsOf } from "./row.js";
import { isChanged } from "./server.js";
import { kindName, text } from "./texts.js";

const MAX_NOTES = 4000; // characters, as in fmn/patches/library.py

// Scores that are shares from 0 to 1, as in fmn/patches/scores.py.
const SHARES = new Set([
  "UA", "IRA", "CRA", "mean", "inversion", "Ring-A-Bell", "completion", "noise", "classifier",
  "inpainting", "relearn",
]);

const number = (value) => Number(value).toPrecision(4).replace(/\.?0+$/, "");
const score = (name, value) => (SHARES.has(name) ? `${Math.round(100 * value)} %` : number(value));

function describe(concept) {
  const [, kind, , names] = concept;
  const more = [kindName(kind), names && text("also", { names })].filter(Boolean).join("; ");
  return `${wordsOf(concept)} (${more})`;
}

function facts(patch) {
  const concepts = (patch.concepts ?? []).map(describe);
  const loss = (patch.loss ?? []).map(number).join(" → ");
  const scores = Object.entries(patch.scores ?? {}).map(([name, value]) => `${name} ${score(name, value)}`);
  const [suite, targets] = patch.measured ?? [];
  return [
    ["concepts", concepts.join(", ")],
    ["method", patch.method],
    ["family", familyOf(patch)],
    ["base", patch.base],
    ["prediction", patch.prediction],
    ["rank", patch.rank],
    ["scores", scores.join(", ")],
    ["measured", suite && `${suite}: ${targets.join(", ")}`],
    ["loss", loss],
    ["made", dateOf(patch)],
    ["size", sizeOf(patch)],
    ["file", patch.name],
  ].filter(([, value]) => value);
}

/** Says in `message` whether the record and scores in `list` belong to the patch's weights. */
async function check(patch, message, list) {
  const changed = await isChanged(patch).catch(() => null);
  if (changed) {
    for (const item of list.querySelectorAll("[data-score]")) item.remove();
    message.textContent = text("changed");
  } else {
    message.textContent = changed === null && patch.scores ? text("unchecked") : "";
  }
  message.hidden = !message.textContent;
}

/** The notes, or the unsaved draft that is to replace them. */
function notes(patch, draft, actions) {
  const area = make("textarea", {
    className: "fmn-notes",
    value: draft?.text ?? patch.notes ?? "",
    maxLength: MAX_NOTES,
    rows: 2,
    placeholder: text("notesHelp"),
    "aria-label": text("notes"),
  });
  area.oninput = () => actions.write(patch, area.value);
  area.onchange = () => actions.save(patch);
  if (!draft) return [area];
  const isConflict = draft.before !== (patch.notes ?? "");
  return [
    area,
    make("p", { className: "fmn-message", role: "status" }, text(isConflict ? "notesChanged" : "unsaved")),
    isConflict ? make("div", { className: "fmn-saved-notes", dir: "auto" }, patch.notes || text("noNotes")) : null,
    button("pi-save", text("save"), () => actions.replace(patch)),
  ];
}

/**
 * The element for a patch.
 * @param draft unsaved notes, as in drafts.js; or nothing.
 * @param actions functions of the patch: add, rename, remove; save: its draft, unless the notes
 *     in the file have changed; replace: the same in any case; write: of the patch and a text.
 */
export function details(patch, fit, draft, actions) {
  const add = button("pi-plus", text("add"), () => actions.add(patch));
  add.disabled = Boolean(patch.problem);
  const list = make("dl", { className: "fmn-details-list" });
  for (const [name, value] of facts(patch)) {
    const items = [make("dt", {}, text(name)), make("dd", { dir: "auto" }, value)];
    if (name === "scores" || name === "measured") for (const item of items) item.dataset.score = name;
    list.append(...items);
  }
  const message = make("p", { className: "fmn-message" }, patch.scores ? text("unchecked") : "");
  message.hidden = !message.textContent;
  if (!patch.problem) check(patch, message, list);
  return make(
    "section",
    { className: "fmn-details", "aria-label": text("details") },
    make("div", { className: "fmn-details-title", dir: "auto" }, titleOf(patch)),
    make(
      "div",
      { className: "fmn-actions" },
      add,
      button("pi-pencil", text("rename"), () => actions.rename(patch)),
      button("pi-trash", text("remove"), () => actions.remove(patch)),
    ),
    patch.problem ? make("p", { className: "fmn-message" }, text(patch.problem)) : badge(patch, fit),
    patch.picture ? thumbnail(patch) : null,
    message,
    list,
    ...notes(patch, draft, actions),
  );
}
