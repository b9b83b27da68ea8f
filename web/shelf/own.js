// Keys and the clipboard: what belongs to the shelf and not to the graph behind it.
import { app } from "../../../scripts/app.js";

// The page hands these on to the canvas, where they delete the selected nodes.
const DELETING = ["Delete", "Backspace"];

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  // Letters choose from a menu; on the page they are commands, which spares text fields only.
  if (DELETING.includes(event.key) || event.target.tagName === "SELECT") event.stopPropagation();
}

function onClipboard(event) {
  // The page copies and pastes nodes, in search fields, too, and where text is selected.
  const typing = event.target.closest?.("input, textarea");
  const selected = !getSelection().isCollapsed && document.activeElement !== app.canvas.canvas;
  if (typing || (event.type === "copy" && selected)) event.stopPropagation();
}

/** Let the page not take from an element what the user does in it. */
export function keepToItself(element) {
  element.addEventListener("keydown", onKey);
  for (const type of ["copy", "cut", "paste"]) element.addEventListener(type, onClipboard);
}
