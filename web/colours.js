// Colours of the pack's own sockets and links. Without one, Nodes 2.0 draws a socket black on black.
import { app } from "../../scripts/app.js";
import { adopt } from "./below.js";

// Three times lighter or darker than the nodes of both themes; none like a type of ComfyUI's.
const COLOURS = {
  FMN_CONCEPT: "#27958a",
  FMN_METHOD: "#7d7ae0",
  FMN_OPTIONS: "#8a8578",
  FMN_KEEP: "#4a9a48",
  FMN_EMBEDDING: "#a56fd0",
  FORGET_PATCH: "#dc5a94",
  FMN_PATCHES: "#c96a34",
};

/** Let a table of colours have ours wherever the palette, which is read in again and again, has none. */
function fallBack(table) {
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
    fallBack(app.canvas.default_connection_color_byType);
    fallBack(window.LGraphCanvas.link_type_colors);
    // Nodes 2.0: a palette's own colours are set on elements, and go before a sheet's.
    const rules = Object.entries(COLOURS).map(([type, ours]) => `--color-datatype-${type}: ${ours};`);
    adopt(`:root { ${rules.join(" ")} }`);
    app.canvas.setDirty(true, true);
  },
});
