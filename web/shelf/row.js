// One patch in the list.
import { button, make } from "./dom.js";
import { DRAGGED, keyOf } from "./graph.js";
import { pictureOf } from "./server.js";
import { familyName, kindName, locale, text } from "./texts.js";

export const SIZE_SETTING = "forget-me-not.shelf.thumbnailSize";
export const SIZES = { small: 32, medium: 48, large: 120 }; // pixels high, and twice as wide
const LINES = 58; // pixels of three lines of text
const PADDING = 14;
const STACKED = "large"; // the size with the text below the picture

let chosenSize = "medium";

/** Apply a size when its setting changes; the setting itself still returns the old one then. */
export function chooseSize(size) {
  if (Object.hasOwn(SIZES, size)) chosenSize = size;
}

/** {size, picture, row}: the size's name, and heights in pixels. */
export function layout() {
  const picture = SIZES[chosenSize];
  const inner = chosenSize === STACKED ? picture + LINES : Math.max(picture, LINES);
  return { size: chosenSize, picture, row: inner + PADDING };
}

/** A concept, and its anchor if it has one. */
export const wordsOf = ([name, , anchor]) => (anchor ? `${name} → ${anchor}` : name);

/** The title of a patch in the list: its concepts, or its file. */
export function titleOf(patch) {
  return (patch.concepts ?? []).map(wordsOf).join(", ") || patch.name.split("/").at(-1);
}

export function dateOf(patch, style = { dateStyle: "medium" }) {
  if (!patch.date) return "";
  return new Date(patch.date * 1000).toLocaleDateString(locale(), style);
}

/** A short date: the day in this year, the month in others. */
function shortDateOf(patch) {
  const isOld = new Date(patch.date * 1000).getFullYear() !== new Date().getFullYear();
  return dateOf(patch, { month: "short", ...(isOld ? { year: "numeric" } : { day: "numeric" }) });
}

export function sizeOf({ size = 0 }) {
  const megabytes = size / 1e6;
  return megabytes < 1 ? `${Math.ceil(size / 1e3)} kB` : `${megabytes.toFixed(1)} MB`;
}

export function familyOf(patch) {
  return patch.model || familyName(patch.family);
}

/** The thumbnail, or an icon instead. */
export function thumbnail(patch) {
  const icon = () => make("i", { className: "pi pi-eraser", "aria-hidden": "true" });
  if (!patch.picture) return make("div", { className: "fmn-picture" }, icon());
  const alt = text("before", { name: titleOf(patch) });
  const image = make("img", { alt, decoding: "async", draggable: false });
  const frame = make("div", { className: "fmn-picture" }, image);
  image.onerror = () => frame.replaceChildren(icon());
  image.src = pictureOf(patch);
  return frame;
}

/** Whether a patch fits the graph, or why it cannot be used. */
export function badge(patch, fit) {
  const kind = patch.problem ? "problem" : fit;
  const label = text(patch.problem ? `${patch.problem}Short` : fit);
  const title = text(patch.problem ?? `${fit}Help`);
  return make("span", { className: `fmn-badge fmn-${kind}`, title }, label);
}

/** The element of a patch: an option of the list box that can be dragged to the canvas. */
export function row(patch, fit, place, add) {
  const kinds = [...new Set((patch.concepts ?? []).map(([, kind]) => kindName(kind)))].join(", ");
  const facts = [kinds, patch.method, familyOf(patch)].filter(Boolean).join(" · ");
  const element = make(
    "div",
    {
      className: "fmn-row",
      role: "option",
      id: `fmn-row-${place.index}`,
      draggable: !patch.problem,
      "aria-setsize": place.count,
      "aria-posinset": place.index + 1,
    },
    thumbnail(patch),
    make(
      "div",
      { className: "fmn-lines" },
      make("div", { className: "fmn-name", dir: "auto", title: `${titleOf(patch)}\n${patch.name}` }, titleOf(patch)),
      make("div", { className: "fmn-facts", dir: "auto", title: facts }, facts || patch.name),
      make(
        "div",
        { className: "fmn-facts fmn-fit" },
        badge(patch, fit),
        make("span", { className: "fmn-date", title: dateOf(patch) }, shortDateOf(patch)),
      ),
    ),
  );
  element.ondragstart = (event) => {
    event.dataTransfer.setData(DRAGGED, keyOf(patch));
    event.dataTransfer.effectAllowed = "copy";
  };
  if (!patch.problem) {
    // For the mouse; with keys there are Enter and the button below the list.
    const plus = button("pi-plus", text("add"), add, false);
    plus.tabIndex = -1;
    plus.classList.add("fmn-plus");
    element.append(plus);
  }
  return element;
}
