// The dialog for a new name. ComfyUI's own has no room for long names and a warning.
import { make } from "./dom.js";
import { text } from "./texts.js";

const TITLE = "fmn-rename-title";
const MESSAGE = "fmn-rename-message";

/**
 * Ask for a new name of some files.
 * @param parent an element inside our styles.
 * @returns a promise of the name, or of null if the user cancels.
 */
export function askName(parent, files, before) {
  const input = make("input", { className: "fmn-search", value: before, autocomplete: "off", spellcheck: false });
  const dialog = make(
    "dialog",
    { className: "fmn-dialog", role: "dialog", "aria-labelledby": TITLE, "aria-describedby": MESSAGE },
    make(
      "form",
      { method: "dialog" },
      make("h2", { id: TITLE }, text("renameTitle")),
      make("label", {}, text("newName"), input),
      make("div", { id: MESSAGE }, make("p", {}, text("renameMessage")), make("p", {}, text("renameFiles"))),
      make("ul", { dir: "auto" }, ...files.map((name) => make("li", {}, name))),
      make(
        "div",
        { className: "fmn-actions" },
        make("button", { type: "button", className: "fmn-button", onclick: () => dialog.close() }, text("cancel")),
        make("button", { className: "fmn-button fmn-main", value: "yes" }, text("confirm")),
      ),
    ),
  );
  // The list and the canvas react to Delete and Enter too.
  dialog.onkeydown = (event) => event.stopPropagation();
  return new Promise((resolve) => {
    dialog.onclose = () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? input.value : null);
    };
    parent.append(dialog);
    dialog.showModal();
    input.select();
  });
}
