// The tab: search and filters, the list, and details of the selected patch.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

import { FITS, bases, fit, loaders } from "./base.js";
import { details } from "./details.js";
import { button, make } from "./dom.js";
import { Drafts } from "./drafts.js";
import { addPatch, keyOf } from "./graph.js";
import { List } from "./list.js";
import { keepToItself } from "./own.js";
import { askName } from "./rename.js";
import { familyOf, layout, row } from "./row.js";
import { change, patches } from "./server.js";
import { familyName, kindName, locale, text } from "./texts.js";

const WAIT = 200; // milliseconds that a graph has to be still
const SUFFIX = /\.safetensors$/i;
const MARK = "forget-me-not.shelf";

const FILTERS = {
  kind: (patch) => [...new Set((patch.concepts ?? []).map(([, kind]) => kindName(kind)))],
  method: (patch) => [patch.method ?? ""],
  family: (patch) => [familyOf(patch)],
};

/** The file of a patch and those beside it, which go where it goes. */
const filesOf = (patch) => [patch.name, ...(patch.beside ?? [])];

class Panel {
  entries = [];
  drafts = new Drafts();
  saving = Promise.resolve();
  known = []; // bases of the graph
  asked = "";
  turn = 0; // counts how often the folders were read
  styles = "";

  /** Show the tab in an element of the frontend, which may hand us the same one many times. */
  open(element) {
    if (this.root?.parentNode === element && this.language === locale()) return;
    performance.mark(`${MARK}.open`);
    this.firstPaint = true;
    element.style.height = "100%";
    if (!this.root || this.language !== locale()) this.build();
    const { top } = this.list; // an element that leaves the page forgets how far it was scrolled
    element.replaceChildren(this.root);
    this.list.element.scrollTop = top;
    if (!this.listening) {
      this.listening = true;
      api.addEventListener("graphChanged", () => this.later());
      api.addEventListener("execution_success", () => this.isOpen && this.refresh());
      window.addEventListener("pagehide", () => this.leave());
    }
    this.layOut();
    this.refresh();
  }

  close() {
    this.root?.remove();
  }

  get isOpen() {
    return this.root?.isConnected ?? false;
  }

  entryOf(key) {
    return this.entries.find((entry) => keyOf(entry) === key);
  }

  build() {
    this.language = locale();
    this.detailed = undefined;
    this.search = make("input", {
      type: "search",
      className: "fmn-search",
      placeholder: text("search"),
      "aria-label": text("search"),
      oninput: () => this.filter(),
    });
    this.selects = Object.fromEntries(
      [...Object.keys(FILTERS), "fit"].map((name) => [
        name,
        make("select", { className: "fmn-select", "aria-label": text(name), onchange: () => this.filter() }),
      ]),
    );
    this.graph = make("div", { className: "fmn-told" });
    this.count = make("div", { className: "fmn-told", role: "status" });
    this.below = make("div", { className: "fmn-below" });
    this.list = new List(
      text("list"),
      (patch, place) => row(patch, fit(patch, this.known), place, () => this.add(patch)),
      (patch) => this.signOf(patch),
      (patch) => this.detail(patch),
      {
        Enter: (patch) => this.add(patch),
        F2: (patch) => this.rename(patch),
        Delete: (patch) => this.remove(patch),
      },
    );
    this.root = make(
      "div",
      { className: "fmn-shelf" },
      make("style", { textContent: this.styles }),
      make(
        "div",
        { className: "fmn-head" },
        make("span", { className: "fmn-title" }, text("title")),
        button("pi-refresh", text("refresh"), () => this.refresh(), false),
      ),
      make("div", { className: "fmn-tools" }, this.search, ...Object.values(this.selects)),
      make("div", { className: "fmn-state" }, this.count, this.graph),
      this.list.element,
      this.below,
    );
    keepToItself(this.root);
    // The graph may have changed without a word, as when a workflow is opened.
    for (const event of ["pointerenter", "focusin"]) {
      this.root.addEventListener(event, () => this.later());
    }
  }

  /** Read the folders and the graph again; what was selected stays selected. */
  async refresh() {
    const turn = ++this.turn;
    this.list.busy = true;
    let found = null; // if it fails, what was read last stays
    let told = null;
    try {
      found = await patches();
    } catch (error) {
      told = error.message;
    }
    if (turn !== this.turn) return; // asked again meanwhile: this answer may be older
    if (found) this.entries = found.sort((a, b) => (b.date ?? 0) - (a.date ?? 0));
    this.drafts.compare(this.entries);
    this.error = told;
    this.offer();
    this.filter();
    this.asked = "";
    await this.look();
    if (turn === this.turn) this.list.busy = false;
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.isOpen && this.look(), WAIT);
  }

  /** See what the graph loads; files are asked for only if that has changed. */
  async look() {
    const found = loaders();
    const asked = JSON.stringify(found);
    if (asked === this.asked) return;
    this.asked = asked;
    const known = await bases(found);
    if (asked !== this.asked) return; // the graph has changed meanwhile
    this.known = known;
    const names = known.map(({ kind, name, family }) =>
      !family ? name || text("unknownBase") : kind === "demo" ? familyName(family) : `${name} (${familyName(family)})`,
    );
    this.graph.textContent = text("graph", { bases: names.join(", ") || text("noBase") });
    this.filter();
  }

  /** Fill the filters with what there is. */
  offer() {
    for (const [name, select] of Object.entries(this.selects)) {
      const values = name === "fit" ? FITS : [...new Set(this.entries.flatMap(FILTERS[name]))].sort();
      const before = select.value;
      select.replaceChildren(
        make("option", { value: "" }, `${text(name === "fit" ? "fitShort" : name)}: ${text("all")}`),
        ...values.map((value) => {
          const label = name === "fit" ? text(value) : value || text("none");
          // A sign before it: a stranger's word may be empty, as the value for all is.
          return make("option", { value: `=${value}` }, label);
        }),
      );
      const kept = [...select.options].find((option) => option.value === before);
      select.value = kept ? before : "";
    }
  }

  /** Does the patch pass search and filters? */
  passes(patch, words) {
    for (const [name, valuesOf] of Object.entries(FILTERS)) {
      const chosen = this.selects[name].value;
      if (chosen && !valuesOf(patch).includes(chosen.slice(1))) return false;
    }
    const wanted = this.selects.fit.value.slice(1);
    if (wanted && (patch.problem || fit(patch, this.known) !== wanted)) return false;
    if (!words.length) return true;
    const spoken = (patch.concepts ?? []).flatMap(([name, , anchor, names]) => [name, anchor, names]);
    const all = [patch.name, patch.method, patch.notes, ...spoken].join("\n").toLowerCase();
    return words.every((each) => all.includes(each));
  }

  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = this.entries.filter((patch) => this.passes(patch, words));
    const key = this.list.item && keyOf(this.list.item);
    const index = key === null ? -1 : shown.findIndex((patch) => keyOf(patch) === key);
    this.list.show(shown, layout().row, index);
    this.count.textContent = this.error
      ? `${text("failed")}: ${this.error}`
      : !this.entries.length
        ? text("empty")
        : !shown.length
          ? text("nothing")
          : text("count", { shown: shown.length, all: this.entries.length });
    this.painted();
  }

  /** The setting of the thumbnails' size has changed, or the tab was opened. */
  layOut() {
    if (!this.root) return;
    const { size, picture, row: height } = layout();
    this.root.style.setProperty("--fmn-height", `${picture}px`);
    this.root.className = `fmn-shelf fmn-${size}`;
    this.list.show(this.list.items, height, this.list.selected);
  }

  painted() {
    if (!this.firstPaint) return;
    this.firstPaint = false;
    requestAnimationFrame(() => performance.measure(`${MARK}.first-paint`, `${MARK}.open`));
  }

  /** All that the look of a patch depends on, in one language. */
  signOf(patch) {
    return `${fit(patch, this.known)} ${JSON.stringify(patch)}`;
  }

  detail(patch) {
    const draft = patch && this.drafts.of(patch);
    const key = patch && `${this.signOf(patch)} ${JSON.stringify(draft?.before)}`;
    if (key === this.detailed || this.isWriting(patch)) return; // leave the user the notes
    Object.assign(this, { detailed: key, patch });
    const actions = {
      add: (each) => this.add(each),
      rename: (each) => this.rename(each),
      remove: (each) => this.remove(each),
      write: (each, notes) => this.drafts.write(each, notes),
      save: (each) => this.save(each),
      insist: (each) => {
        this.drafts.insist(each);
        this.save(each);
      },
    };
    this.below.replaceChildren(...(patch ? [details(patch, fit(patch, this.known), draft, actions)] : []));
  }

  /** Are notes being written that would be lost if the details were made anew, for this patch? */
  isWriting(patch) {
    if (!this.patch) return false;
    const active = document.activeElement;
    const typing = active?.tagName === "TEXTAREA" && this.below.contains(active);
    if (patch) return typing && keyOf(patch) === keyOf(this.patch);
    return typing || Boolean(this.drafts.of(this.patch)); // its file has gone, the text has not
  }

  say(severity, summary, detail) {
    app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 10000 : 3000 });
  }

  add(patch) {
    if (patch.problem) return;
    addPatch(patch);
    this.say("success", text("title"), text("added"));
  }

  async rename(patch) {
    const before = { ...patch };
    const file = patch.name.split("/").at(-1);
    const to = await askName(this.root, filesOf(patch), file.replace(SUFFIX, ""));
    if (to === null || to.trim() === file.replace(SUFFIX, "")) return;
    await this.ask("rename", before, { to }, (name) => {
      this.drafts.rename(before, name);
      // So that it is found again, and stays selected. The list may have been read anew meanwhile.
      const entry = this.entryOf(keyOf(before));
      if (entry) entry.name = name;
    });
  }

  async remove(patch) {
    const sure = await app.extensionManager.dialog.confirm({
      title: text("removeTitle"),
      message: text("removeMessage"),
      type: "delete",
      itemList: filesOf(patch),
    });
    if (sure) await this.ask("delete", patch, {}, () => this.gone(patch));
  }

  /** The file of a patch has been deleted: the next one is selected, or the last. */
  gone(patch) {
    const { items, selected, item } = this.list;
    this.drafts.drop(patch);
    if (item && keyOf(item) === keyOf(patch)) {
      this.list.select(selected + 1 < items.length ? selected + 1 : selected - 1);
    }
    this.entries = this.entries.filter((each) => keyOf(each) !== keyOf(patch));
    this.filter();
  }

  /** Save what was written about a patch; one after the other, as each counts on the one before. */
  save(patch) {
    this.saving = this.saving.then(() => this.store(patch)).catch(console.error);
  }

  async store(patch) {
    const draft = this.drafts.of(patch);
    if (!draft) return;
    const { text: notes, before } = draft;
    await this.ask("notes", patch, { notes, before }, (kept) => {
      for (const each of [patch, this.entryOf(keyOf(patch))]) {
        if (each) each.notes = kept;
      }
      this.drafts.saved(patch, notes, kept);
      this.say("success", text("saved"));
    });
  }

  /** The page is left, maybe in the middle of a word. */
  leave() {
    for (const draft of this.drafts.all()) {
      const { text: notes, before } = draft;
      change("notes", draft, { notes, before }, true).catch(() => {}); // nobody is there to be told
    }
  }

  async ask(what, patch, more, done = () => {}) {
    const left = document.activeElement; // where a dialog has left the focus
    try {
      done(await change(what, patch, more));
    } catch (error) {
      this.say("error", text("changeFailed"), error.message);
    }
    // Back to the list, unless the user has gone elsewhere meanwhile.
    const stayed = [left, document.body].includes(document.activeElement);
    if (what !== "notes" && stayed) this.list.element.focus();
    await this.refresh();
  }
}

export const panel = new Panel();
