// An element of ours below a node's own widgets, as high as what it holds.

const BORDER = 2; // of the element, both sides
const MARGIN = 10; // that the page leaves around a widget
let count = 0;

export function made(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text; // names are a stranger's words
  return element;
}

/** Let the page have some CSS. Nothing of ours is put into its head, and nothing into each node. */
export function adopt(style) {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(style);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
}

export class Below {
  /** type: of the widget. name: the element's class; narrow: the least width of the node. */
  constructor(node, { type, name, narrow = 0 }) {
    this.node = node;
    this.narrow = narrow;
    this.element = made("div", name);
    this.element.hidden = true;
    // Or the page copies the selected nodes instead of the selected words.
    this.element.addEventListener("copy", (event) => {
      if (!window.getSelection().isCollapsed) event.stopPropagation();
    });
    this.content = made("div", "fmn-content");
    this.element.append(this.content);
    this.height = 0;
    this.sized = new ResizeObserver(() => this.fit());
    this.sized.observe(this.content);
    const height = () => this.height;
    // Nodes 2.0 keeps the element of a widget that has the same node id and name in another workflow.
    this.widget = node.addDOMWidget(`fmn ${++count}`, type, this.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: height,
      getMaxHeight: height,
      getValue: () => "",
      setValue: () => {},
    });
    this.widget.serialize = false;
    const removed = node.onRemoved;
    node.onRemoved = (...args) => {
      this.sized.disconnect();
      return removed?.apply(node, args);
    };
  }

  fill(...parts) {
    this.element.hidden = false;
    this.content.replaceChildren(...parts);
  }

  /** Make room for what is shown. */
  fit() {
    if (!this.content.offsetHeight) return;
    this.scrolls(this.content.scrollHeight > this.content.clientHeight);
    const height = this.content.offsetHeight + BORDER + 2 * (this.widget.margin ?? MARGIN);
    if (Math.abs(height - this.height) < 2) return;
    this.height = height;
    const [width, before] = this.node.size;
    if (before !== this.given) this.own = before; // the user's, or the workflow's
    const [, needed] = this.node.computeSize();
    this.node.setSize([Math.max(width, this.narrow), Math.max(this.own, needed)]);
    this.given = this.node.size[1];
    this.node.setDirtyCanvas?.(true, true);
  }

  /** What is longer than its place can be scrolled: Nodes 2.0 hands the wheel to the canvas else. */
  scrolls(long) {
    for (const [name, value] of [["tabindex", "0"], ["data-capture-wheel", "true"]]) {
      if (long) this.content.setAttribute(name, value);
      else this.content.removeAttribute(name);
    }
  }
}
