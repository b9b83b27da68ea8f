// Elements made without HTML: content of files is untrusted, and only ever set as text.

/** An element with properties, and elements or text as children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A button with one of the frontend's icons and a label, which is only its name unless shown. */
export function button(icon, label, onclick, isLabelShown = true) {
  const properties = { type: "button", className: "fmn-button", title: label, onclick };
  if (!isLabelShown) properties["aria-label"] = label;
  const image = make("i", { className: `pi ${icon}`, "aria-hidden": "true" });
  return make("button", properties, image, isLabelShown ? make("span", {}, label) : null);
}
