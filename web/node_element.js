// An element below a node's widgets, as high as its content.

const BORDER = 2; // pixels of the element, both sides together
const MARGIN = 10; // pixels that the page leaves around a widget
let count = 0;

/** A new element. The text is set as text, never as HTML: names come from untrusted files. */
export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Add CSS to the page. Its rules match nothing outside our elements. */
export function addStyles(css) {
  const { head } = document;
  head.append(element("style", undefined, css));
}

export class NodeElement {
  /**
   * type: of the widget. className: of the element.
   * minWidth: of a new node, in pixels. room: what a new node has below its widgets from the start,
   * so that it does not grow over its neighbours when it runs.
   */
  constructor(node, { type, className, minWidth = 0, room = 0 }) {
    this.node = node;
    this.element = element("div", className);
    this.element.hidden = true;
    // Otherwise the page copies the selected nodes instead of the selected text.
    this.element.addEventListener("copy", (event) => {
      if (!window.getSelection().isCollapsed) event.stopPropagation();
    });
    this.content = element("div", "fmn-content");
    this.element.append(this.content);
    this.height = 0;
    this.resized = new ResizeObserver(() => this.fit());
    this.resized.observe(this.content);
    const height = () => this.height;
    // A new name each time: Nodes 2.0 keeps the element of a widget that has the same node id and
    // name in another workflow.
    this.widget = node.addDOMWidget(`fmn ${++count}`, type, this.element, {
      serialize: false,
      hideOnZoom: false,
      room, // tools/examples.py reads it
      getMinHeight: height,
      getMaxHeight: height,
      getValue: () => "",
      setValue: () => {},
    });
    this.widget.serialize = false;
    const [width, current] = node.size; // a saved workflow sets its own size after this
    node.setSize([Math.max(width, minWidth), current + room]);
    const onRemoved = node.onRemoved;
    node.onRemoved = (...args) => {
      this.resized.disconnect();
      return onRemoved?.apply(node, args);
    };
  }

  fill(...children) {
    this.element.hidden = false;
    this.content.replaceChildren(...children);
  }

  /** Resize the node to its content. */
  fit() {
    if (!this.content.offsetHeight) return;
    this.makeScrollable(this.content.scrollHeight > this.content.clientHeight);
    const height = this.content.offsetHeight + BORDER + 2 * (this.widget.margin ?? MARGIN);
    if (Math.abs(height - this.height) < 2) return;
    this.height = height;
    const [width, current] = this.node.size;
    // A height that we did not set is the user's or the workflow's: the node keeps at least that.
    if (current !== this.setHeight) this.userHeight = current;
    const [, needed] = this.node.computeSize();
    this.node.setSize([width, Math.max(this.userHeight, needed)]);
    this.setHeight = this.node.size[1];
    this.node.setDirtyCanvas?.(true, true);
  }

  /** Let the wheel scroll content that is too long; otherwise Nodes 2.0 hands it to the canvas. */
  makeScrollable(isLong) {
    for (const [name, value] of [["tabindex", "0"], ["data-capture-wheel", "true"]]) {
      if (isLong) this.content.setAttribute(name, value);
      else this.content.removeAttribute(name);
    }
  }
}
