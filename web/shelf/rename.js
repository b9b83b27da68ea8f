// The question for a new name. ComfyUI's own has room for a word or two, and none for a warning.
import { make } from "./dom.js";
import { text } from "./texts.js";

const TITLE = "fmn-rename-title";
const TOLD = "fmn-rename-told";

/**
 * Ask for another name of some files.
 * @param parent the element that has our styles.
 * @returns a promise of the name, or of null if there shall be none.
 */
export function askName(parent, files, before) {
  const input = make("input", { className: "fmn-search", value: before, autocomplete: "off", spellcheck: false });
  const dialog = make(
    "dialog",
    { className: "fmn-dialog", role: "dialog", "aria-labelledby": TITLE, "aria-describedby": TOLD },
    make(
      "form",
      { method: "dialog" },
      make("h2", { id: TITLE }, text("renameTitle")),
      make("label", {}, text("newName"), input),
      make("div", { id: TOLD }, make("p", {}, text("renameMessage")), make("p", {}, text("renameFiles"))),
      make("ul", { dir: "auto" }, ...files.map((name) => make("li", {}, name))),
      make(
        "div",
        { className: "fmn-actions" },
        make("button", { type: "button", className: "fmn-button", onclick: () => dialog.close() }, text("cancel")),
        make("button", { className: "fmn-button fmn-main", value: "yes" }, text("confirm")),
      ),
    ),
  );
  // Keys are the dialog's own: the list and the canvas have other uses for Delete and Enter.
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
