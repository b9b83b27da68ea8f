// Notes that the user has written and the server does not have yet.
import { keyOf } from "./graph.js";

export class Drafts {
  kept = new Map(); // key of a patch -> {folder, name, text, before}

  /** What was written about a patch: {text, before: the notes that stood there}; or nothing. */
  of(patch) {
    const draft = this.kept.get(keyOf(patch));
    return draft && draft.text !== draft.before ? draft : undefined;
  }

  all() {
    return [...this.kept.values()].filter((draft) => this.of(draft));
  }

  write({ folder, name, notes = "" }, text) {
    const { before } = this.kept.get(keyOf({ folder, name })) ?? { before: notes };
    this.kept.set(keyOf({ folder, name }), { folder, name, text, before });
  }

  /** The user has seen the notes that stand there now, and wants others all the same. */
  insist(patch) {
    const draft = this.kept.get(keyOf(patch));
    if (draft) draft.before = patch.notes ?? "";
  }

  /** The server has taken a text, and keeps it as `notes`; the user may have written on. */
  saved(patch, text, notes) {
    const draft = this.kept.get(keyOf(patch));
    if (draft?.text === text) this.drop(patch);
    else if (draft) draft.before = notes;
  }

  drop(patch) {
    this.kept.delete(keyOf(patch));
  }

  /** The file of a patch has another name now. */
  rename(patch, name) {
    const draft = this.kept.get(keyOf(patch));
    this.drop(patch);
    if (draft) this.kept.set(keyOf({ ...draft, name }), { ...draft, name });
  }

  /** Forget what stands in the files by now, as notes that were sent when the page was left. */
  compare(patches) {
    for (const patch of patches) {
      if (this.kept.get(keyOf(patch))?.text === (patch.notes ?? "")) this.drop(patch);
    }
  }
}
