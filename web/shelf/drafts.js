// Notes that are not saved yet.
import { keyOf } from "./graph.js";

export class Drafts {
  byKey = new Map(); // key of a patch -> {folder, name, text, before}

  /** The unsaved notes of a patch: {text, before: the saved notes when writing began}; or nothing. */
  of(patch) {
    const draft = this.byKey.get(keyOf(patch));
    return draft && draft.text !== draft.before ? draft : undefined;
  }

  all() {
    return [...this.byKey.values()].filter((draft) => this.of(draft));
  }

  write({ folder, name, notes = "" }, text) {
    const { before } = this.byKey.get(keyOf({ folder, name })) ?? { before: notes };
    this.byKey.set(keyOf({ folder, name }), { folder, name, text, before });
  }

  /** The user has seen the notes that were saved meanwhile, and wants to replace them. */
  replace(patch) {
    const draft = this.byKey.get(keyOf(patch));
    if (draft) draft.before = patch.notes ?? "";
  }

  /** The server has saved a text as `notes`; the user may have written more since. */
  saved(patch, text, notes) {
    const draft = this.byKey.get(keyOf(patch));
    if (draft?.text === text) this.drop(patch);
    else if (draft) draft.before = notes;
  }

  drop(patch) {
    this.byKey.delete(keyOf(patch));
  }

  /** The file of a patch was renamed. */
  rename(patch, name) {
    const draft = this.byKey.get(keyOf(patch));
    this.drop(patch);
    if (draft) this.byKey.set(keyOf({ ...draft, name }), { ...draft, name });
  }

  /** Drop drafts that the files contain by now, such as notes sent when the page was closed. */
  dropSaved(patches) {
    for (const patch of patches) {
      if (this.byKey.get(keyOf(patch))?.text === (patch.notes ?? "")) this.drop(patch);
    }
  }
}
