// Elements made without any HTML: what a file says of itself is only ever set as text.

/** An element with properties, and children that are elements or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button with one of the frontend's icons and a text, or the text as its name alone. */
export function button(icon, label, onclick, shown = true) {
  const properties = { type: "button", className: "fmn-button", title: label, onclick };
  if (!shown) properties["aria-label"] = label;
  const mark = make("i", { className: `pi ${icon}`, "aria-hidden": "true" });
  return make("button", properties, mark, shown ? make("span", {}, label) : null);
}
