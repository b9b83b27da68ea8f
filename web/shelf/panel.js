// The sidebar tab: search and filters, the list, and details of the selected patch.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

import { FITS, basesOf, fit, loadedFiles } from "./base.js";
import { details } from "./details.js";
import { button, make } from "./dom.js";
import { Drafts } from "./drafts.js";
import { addPatch, keyOf } from "./graph.js";
import { isolate } from "./isolate.js";
import { List } from "./list.js";
import { askName } from "./rename.js";
import { familyOf, layout, row } from "./row.js";
import { change, patches } from "./server.js";
import { familyName, kindName, locale, text } from "./texts.js";

const WAIT = 200; // milliseconds without a change before the graph is read
const SUFFIX = /\.safetensors$/i;
const MARK = "forget-me-not.shelf";

const FILTERS = {
  kind: (patch) => [...new Set((patch.concepts ?? []).map(([, kind]) => kindName(kind)))],
  method: (patch) => [patch.method ?? ""],
  family: (patch) => [familyOf(patch)],
};

/** The file of a patch and those beside it, which are renamed and deleted with it. */
const filesOf = (patch) => [patch.name, ...(patch.beside ?? [])];

class Panel {
  entries = [];
  drafts = new Drafts();
  saving = Promise.resolve();
  bases = []; // of the graph
  loaded = ""; // the files that they belong to
  reads = 0; // how often the folders were read
  styles = "";

  /** Show the tab in an element of the frontend, which may be the same one again. */
  open(element) {
    if (this.root?.parentNode === element && this.language === locale()) return;
    performance.mark(`${MARK}.open`);
    this.firstPaint = true;
    element.style.height = "100%";
    if (!this.root || this.language !== locale()) this.build();
    const { top } = this.list; // an element loses its scroll position when it leaves the page
    element.replaceChildren(this.root);
    this.list.element.scrollTop = top;
    if (!this.listening) {
      this.listening = true;
      api.addEventListener("graphChanged", () => this.readGraphLater());
      api.addEventListener("execution_success", () => this.isOpen && this.refresh());
      window.addEventListener("pagehide", () => this.saveOnLeaving());
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
    this.detailsVersion = undefined;
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
    this.graph = make("div", { className: "fmn-message" });
    this.count = make("div", { className: "fmn-message", role: "status" });
    this.details = make("div", { className: "fmn-selected" });
    this.list = new List(
      text("list"),
      (patch, place) => row(patch, fit(patch, this.bases), place, () => this.add(patch)),
      (patch) => this.versionOf(patch),
      (patch) => this.showDetails(patch),
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
      this.details,
    );
    isolate(this.root);
    // The graph may have changed without an event, as when a workflow is opened.
    for (const event of ["pointerenter", "focusin"]) {
      this.root.addEventListener(event, () => this.readGraphLater());
    }
  }

  /** Read the folders and the graph again; the selection stays. */
  async refresh() {
    const read = ++this.reads;
    this.list.busy = true;
    let entries = null; // if reading fails, the last entries stay
    let problem = null;
    try {
      entries = await patches();
    } catch (error) {
      problem = error.message;
    }
    if (read !== this.reads) return; // read again meanwhile: this answer may be older
    if (entries) this.entries = entries.sort((a, b) => (b.date ?? 0) - (a.date ?? 0));
    this.drafts.dropSaved(this.entries);
    this.error = problem;
    this.fillFilters();
    this.filter();
    this.loaded = "";
    await this.readGraph();
    if (read === this.reads) this.list.busy = false;
  }

  readGraphLater() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.isOpen && this.readGraph(), WAIT);
  }

  /** Read which files the graph loads; the server is asked only if they have changed. */
  async readGraph() {
    const files = loadedFiles();
    const loaded = JSON.stringify(files);
    if (loaded === this.loaded) return;
    this.loaded = loaded;
    const bases = await basesOf(files);
    if (loaded !== this.loaded) return; // the graph has changed meanwhile
    this.bases = bases;
    const names = bases.map(({ kind, name, family }) =>
      !family ? name || text("unknownBase") : kind === "demo" ? familyName(family) : `${name} (${familyName(family)})`,
    );
    this.graph.textContent = text("graph", { bases: names.join(", ") || text("noBase") });
    this.filter();
  }

  /** Offer in the filters what the patches have. */
  fillFilters() {
    for (const [name, select] of Object.entries(this.selects)) {
      const values = name === "fit" ? FITS : [...new Set(this.entries.flatMap(FILTERS[name]))].sort();
      const before = select.value;
      select.replaceChildren(
        make("option", { value: "" }, `${text(name === "fit" ? "fitShort" : name)}: ${text("all")}`),
        ...values.map((value) => {
          const label = name === "fit" ? text(value) : value || text("none");
          // "=" tells an empty value of a file from the value for all.
          return make("option", { value: `=${value}` }, label);
        }),
      );
      const kept = [...select.options].find((option) => option.value === before);
      select.value = kept ? before : "";
    }
  }

  /** Does the patch match search and filters? */
  matches(patch, words) {
    for (const [name, valuesOf] of Object.entries(FILTERS)) {
      const chosen = this.selects[name].value;
      if (chosen && !valuesOf(patch).includes(chosen.slice(1))) return false;
    }
    const wanted = this.selects.fit.value.slice(1);
    if (wanted && (patch.problem || fit(patch, this.bases) !== wanted)) return false;
    if (!words.length) return true;
    const concepts = (patch.concepts ?? []).flatMap(([name, , anchor, names]) => [name, anchor, names]);
    const all = [patch.name, patch.method, patch.notes, ...concepts].join("\n").toLowerCase();
    return words.every((each) => all.includes(each));
  }

  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = this.entries.filter((patch) => this.matches(patch, words));
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
    this.measureFirstPaint();
  }

  /** Apply the thumbnails' size. */
  layOut() {
    if (!this.root) return;
    const { size, picture, row: height } = layout();
    this.root.style.setProperty("--fmn-height", `${picture}px`);
    this.root.className = `fmn-shelf fmn-${size}`;
    this.list.show(this.list.items, height, this.list.selected);
  }

  measureFirstPaint() {
    if (!this.firstPaint) return;
    this.firstPaint = false;
    requestAnimationFrame(() => performance.measure(`${MARK}.first-paint`, `${MARK}.open`));
  }

  /** Everything the look of a patch depends on, in one language. */
  versionOf(patch) {
    return `${fit(patch, this.bases)} ${JSON.stringify(patch)}`;
  }

  showDetails(patch) {
    const draft = patch && this.drafts.of(patch);
    const version = patch && `${this.versionOf(patch)} ${JSON.stringify(draft?.before)}`;
    if (version === this.detailsVersion || this.isWriting(patch)) return; // keep the user's notes
    Object.assign(this, { detailsVersion: version, patch });
    const actions = {
      add: (each) => this.add(each),
      rename: (each) => this.rename(each),
      remove: (each) => this.remove(each),
      write: (each, notes) => this.drafts.write(each, notes),
      save: (each) => this.save(each),
      replace: (each) => {
        this.drafts.replace(each);
        this.save(each);
      },
    };
    this.details.replaceChildren(...(patch ? [details(patch, fit(patch, this.bases), draft, actions)] : []));
  }

  /** Would notes that are being written be lost if the details of this patch were shown? */
  isWriting(patch) {
    if (!this.patch) return false;
    const active = document.activeElement;
    const isTyping = active?.tagName === "TEXTAREA" && this.details.contains(active);
    if (patch) return isTyping && keyOf(patch) === keyOf(this.patch);
    return isTyping || Boolean(this.drafts.of(this.patch)); // its file is gone, the text is not
  }

  notify(severity, summary, detail) {
    app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 10000 : 3000 });
  }

  add(patch) {
    if (patch.problem) return;
    addPatch(patch);
    this.notify("success", text("title"), text("added"));
  }

  async rename(patch) {
    const before = { ...patch };
    const file = patch.name.split("/").at(-1);
    const to = await askName(this.root, filesOf(patch), file.replace(SUFFIX, ""));
    if (to === null || to.trim() === file.replace(SUFFIX, "")) return;
    await this.change("rename", before, { to }, (name) => {
      this.drafts.rename(before, name);
      // Keeps it selected. The list may have been read again meanwhile.
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
    if (sure) await this.change("delete", patch, {}, () => this.onDeleted(patch));
  }

  /** The file of a patch was deleted: select the next one, or the last. */
  onDeleted(patch) {
    const { items, selected, item } = this.list;
    this.drafts.drop(patch);
    if (item && keyOf(item) === keyOf(patch)) {
      this.list.select(selected + 1 < items.length ? selected + 1 : selected - 1);
    }
    this.entries = this.entries.filter((each) => keyOf(each) !== keyOf(patch));
    this.filter();
  }

  /** Save the draft of a patch; one after the other, as each builds on the one before. */
  save(patch) {
    this.saving = this.saving.then(() => this.store(patch)).catch(console.error);
  }

  async store(patch) {
    const draft = this.drafts.of(patch);
    if (!draft) return;
    const { text: notes, before } = draft;
    await this.change("notes", patch, { notes, before }, (kept) => {
      for (const each of [patch, this.entryOf(keyOf(patch))]) {
        if (each) each.notes = kept;
      }
      this.drafts.saved(patch, notes, kept);
      this.notify("success", text("saved"));
    });
  }

  /** The page is being closed. */
  saveOnLeaving() {
    for (const draft of this.drafts.all()) {
      const { text: notes, before } = draft;
      change("notes", draft, { notes, before }, true).catch(() => {}); // no page is left to show it
    }
  }

  async change(action, patch, more, done = () => {}) {
    const focused = document.activeElement; // after a dialog has closed
    try {
      done(await change(action, patch, more));
    } catch (error) {
      this.notify("error", text("changeFailed"), error.message);
    }
    // Back to the list, unless the user has moved the focus meanwhile.
    const stayed = [focused, document.body].includes(document.activeElement);
    if (action !== "notes" && stayed) this.list.element.focus();
    await this.refresh();
  }
}

export const panel = new Panel();
