// A list box of any length: only the rows in sight are elements.
import { make } from "./dom.js";

const BEYOND = 4; // rows kept above and below what is seen

export class List {
  /**
   * @param label name of the list box.
   * @param draw function from (item, {index, count, selected}) to a row's element.
   * @param onSelect called with an item, or null.
   * @param keys key -> function, for keys that act on the selected item.
   */
  constructor(label, draw, onSelect, keys) {
    Object.assign(this, { draw, onSelect, keys });
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

  /** Show other items, or the same in another height. It stays scrolled as it is. */
  show(items, height, selected = -1) {
    Object.assign(this, { items, height, selected });
    this.space.style.height = `${items.length * height}px`;
    this.clear();
    this.fill();
    this.onSelect(this.item);
  }

  clear() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
  }

  fill() {
    const { scrollTop } = this.element;
    // Without styles it would be as high as all rows together.
    const seen = Math.min(this.element.clientHeight, window.innerHeight);
    const first = Math.max(0, Math.floor(scrollTop / this.height) - BEYOND);
    const end = Math.min(
      this.items.length,
      Math.ceil((scrollTop + seen) / this.height) + BEYOND,
    );
    for (const [index, row] of this.rows) {
      if (index >= first && index < end) continue;
      row.remove();
      this.rows.delete(index);
    }
    for (let index = first; index < end; index++) {
      if (!this.rows.has(index)) this.place(index);
    }
    this.point();
  }

  place(index) {
    const place = { index, count: this.items.length, selected: index === this.selected };
    const row = this.draw(this.items[index], place);
    row.style.height = `${this.height}px`;
    row.style.transform = `translateY(${index * this.height}px)`;
    row.fmnIndex = index;
    this.rows.set(index, row);
    this.space.append(row);
  }

  /** Tell assistive technology which row is the active one, if it is there. */
  point() {
    const row = this.rows.get(this.selected);
    if (row) this.element.setAttribute("aria-activedescendant", row.id);
    else this.element.removeAttribute("aria-activedescendant");
  }

  select(index) {
    this.rows.get(this.selected)?.setAttribute("aria-selected", "false");
    this.selected = index;
    this.bringIntoSight();
    this.rows.get(this.selected)?.setAttribute("aria-selected", "true");
    this.point();
    this.onSelect(this.item);
  }

  bringIntoSight() {
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
    // The page would hand Delete on to the canvas, where it deletes the selected nodes.
    event.preventDefault();
    event.stopPropagation();
    if (act && this.item) act(this.item);
    else if (!act && last >= 0) this.select(Math.max(0, Math.min(moves[event.key], last)));
  }
}
