// The patch shelf: a sidebar tab with all forget patches.
import { app } from "../../scripts/app.js";

import { acceptDrops } from "./shelf/graph.js";
import { panel } from "./shelf/panel.js";
import { SIZES, SIZE_SETTING, chooseSize } from "./shelf/row.js";
import { text } from "./shelf/texts.js";

app.registerExtension({
  name: "forgetmenot.shelf",
  settings: [
    {
      id: SIZE_SETTING,
      category: ["Forget-Me-Not", text("title"), text("thumbnailSize")],
      name: text("thumbnailSize"),
      tooltip: text("thumbnailSizeHelp"),
      type: "combo",
      options: Object.keys(SIZES).map((size) => ({ text: text(size), value: size })),
      defaultValue: "medium",
      onChange: (size) => {
        chooseSize(size);
        panel.layOut();
      },
    },
  ],
  async setup() {
    // Kept by the panel: a link would be fetched again each time the tab is opened.
    const styles = await fetch(new URL("shelf/shelf.css", import.meta.url));
    if (styles.ok) panel.styles = await styles.text();
    app.extensionManager.registerSidebarTab({
      id: "forget-me-not.shelf",
      icon: "pi pi-eraser",
      title: text("tab"),
      tooltip: text("title"),
      type: "custom",
      render: (element) => panel.open(element),
      destroy: () => panel.close(),
    });
    acceptDrops((key) => panel.entryOf(key));
  },
});
