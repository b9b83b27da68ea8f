// Colours of the pack's sockets and links. Without a colour, Nodes 2.0 draws a socket black on black.
import { app } from "../../scripts/app.js";
import { addStyles } from "./node_element.js";

// Contrast of at least 3 with the nodes of both themes; none resembles a type of ComfyUI's.
const COLOURS = {
  FMN_CONCEPT: "#27958a",
  FMN_METHOD: "#7d7ae0",
  FMN_OPTIONS: "#8a8578",
  FMN_KEEP: "#4a9a48",
  FMN_EMBEDDING: "#a56fd0",
  FORGET_PATCH: "#dc5a94",
  FMN_PATCHES: "#c96a34",
};

/** Use our colours where the palette has none. A table is overwritten whenever a palette is read. */
function addFallbacks(table) {
  for (const [type, ours] of Object.entries(COLOURS)) {
    let chosen = table[type];
    Object.defineProperty(table, type, {
      get: () => chosen || ours,
      set: (colour) => { chosen = colour; },
      enumerable: true,
      configurable: true,
    });
  }
}

app.registerExtension({
  name: "forgetmenot.colours",
  setup() {
    addFallbacks(app.canvas.default_connection_color_byType);
    addFallbacks(window.LGraphCanvas.link_type_colors);
    // Nodes 2.0: a palette sets its colours on elements, so they win over a style sheet's.
    const rules = Object.entries(COLOURS).map(([type, ours]) => `--color-datatype-${type}: ${ours};`);
    addStyles(`:root { ${rules.join(" ")} }`);
    app.canvas.setDirty(true, true);
  },
});
