// Keeps keys and clipboard events in the shelf from the graph behind it.
import { app } from "../../../scripts/app.js";

// The page forwards these to the canvas, where they delete the selected nodes.
const DELETING = ["Delete", "Backspace"];

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  // Letters choose from a menu; on the page they are commands, except in text fields.
  if (DELETING.includes(event.key) || event.target.tagName === "SELECT") event.stopPropagation();
}

function onClipboard(event) {
  // The page copies and pastes nodes, even in search fields and where text is selected.
  const isTyping = event.target.closest?.("input, textarea");
  const isTextSelected = !getSelection().isCollapsed && document.activeElement !== app.canvas.canvas;
  if (isTyping || (event.type === "copy" && isTextSelected)) event.stopPropagation();
}

/** Keep the page from reacting to what the user does in an element. */
export function isolate(element) {
  element.addEventListener("keydown", onKey);
  for (const type of ["copy", "cut", "paste"]) element.addEventListener(type, onClipboard);
}
