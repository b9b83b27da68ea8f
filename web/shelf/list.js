// A list box of any length: only visible rows are elements.
import { make } from "./dom.js";

const BEYOND = 4; // rows kept above and below the visible ones

export class List {
  /**
   * @param label name of the list box.
   * @param draw function from (item, {index, count}) to a row's element.
   * @param versionOf function from an item to a string that changes with the look of its row.
   * @param onSelect called with an item, or null.
   * @param keys key -> function, for keys that act on the selected item.
   */
  constructor(label, draw, versionOf, onSelect, keys) {
    Object.assign(this, { draw, versionOf, onSelect, keys });
    this.items = [];
    this.rows = new Map(); // index -> element
    this.selected = -1;
    this.height = 1;
    this.top = 0; // pixels scrolled
    this.space = make("div", { className: "fmn-space", role: "presentation" });
    this.element = make(
      "div",
      { className: "fmn-list", role: "listbox", tabIndex: 0, "aria-label": label },
      this.space,
    );
    this.element.onscroll = () => {
      this.top = this.element.scrollTop;
      this.fill();
    };
    this.element.onkeydown = (event) => this.onKey(event);
    this.element.onclick = (event) => this.onClick(event);
    this.resized = new ResizeObserver(() => this.fill());
    this.resized.observe(this.element);
  }

  get item() {
    return this.items[this.selected] ?? null;
  }

  /** Show other items, or the same ones in another height, at the same scroll position. */
  show(items, height, selected = -1) {
    Object.assign(this, { items, height, selected });
    this.space.style.height = `${items.length * height}px`;
    // Unchanged rows stay: one may be pressed, or being dragged to the canvas.
    this.prune((index, row) => index >= items.length || row.fmnVersion !== this.versionAt(index));
    this.fill();
    this.onSelect(this.item);
  }

  prune(isUnwanted) {
    for (const [index, row] of this.rows) {
      if (!isUnwanted(index, row)) continue;
      row.remove();
      this.rows.delete(index);
    }
  }

  /** Everything a row depends on, except the selection, which is set on the element. */
  versionAt(index) {
    return `${this.height} ${this.items.length} ${this.versionOf(this.items[index])}`;
  }

  fill() {
    const { scrollTop } = this.element;
    // Without styles it would be as high as all rows together.
    const visible = Math.min(this.element.clientHeight, window.innerHeight);
    const first = Math.max(0, Math.floor(scrollTop / this.height) - BEYOND);
    const end = Math.min(
      this.items.length,
      Math.ceil((scrollTop + visible) / this.height) + BEYOND,
    );
    this.prune((index) => index < first || index >= end);
    // Last first, as each is inserted before the next.
    for (let index = end - 1; index >= first; index--) {
      if (!this.rows.has(index)) this.insert(index);
      this.rows.get(index).setAttribute("aria-selected", index === this.selected);
    }
    this.markActive();
  }

  insert(index) {
    const row = this.draw(this.items[index], { index, count: this.items.length });
    row.style.height = `${this.height}px`;
    row.style.transform = `translateY(${index * this.height}px)`;
    Object.assign(row, { fmnIndex: index, fmnVersion: this.versionAt(index) });
    this.space.insertBefore(row, this.rows.get(index + 1) ?? null);
    this.rows.set(index, row);
  }

  /** Say whether the items are being read again. */
  set busy(busy) {
    this.element.setAttribute("aria-busy", busy);
  }

  /** Tell assistive technology which row is active, if it is visible. */
  markActive() {
    const row = this.rows.get(this.selected);
    if (row) this.element.setAttribute("aria-activedescendant", row.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  select(index) {
    this.selected = index;
    this.scrollToSelected();
    this.onSelect(this.item);
  }

  scrollToSelected() {
    const { scrollTop, clientHeight } = this.element;
    const top = this.selected * this.height;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + this.height > scrollTop + clientHeight) {
      this.element.scrollTop = top + this.height - clientHeight;
    }
    this.fill();
  }

  onClick(event) {
    const row = event.target.closest("[role=option]");
    if (row) this.select(row.fmnIndex);
  }

  onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.height) - 1);
    const last = this.items.length - 1;
    const moves = {
      ArrowDown: this.selected + 1,
      ArrowUp: this.selected - 1,
      PageDown: this.selected + page,
      PageUp: this.selected - page,
      Home: 0,
      End: last,
    };
    const act = this.keys[event.key];
    if (!(event.key in moves) && !act) return;
    // The page would forward Delete to the canvas, where it deletes the selected nodes.
    event.preventDefault();
    event.stopPropagation();
    if (act && this.item) act(this.item);
    else if (!act && last >= 0) this.select(Math.max(0, Math.min(moves[event.key], last)));
  }
}
