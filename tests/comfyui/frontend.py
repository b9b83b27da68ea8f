"""The real frontend in Chromium, and the examples it opens."""

import os
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
ARTEFACTS = ROOT / "test-artifacts"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# What the frontend asks for and tests do not have: its own templates, and descriptions of packs.
NO_NETWORK = ("/templates/index.json", "core workflow templates", "https://api.comfy.org/")
PATIENCE = 120_000  # ms
READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.FMN_Concept"


@contextmanager
def opened(url, folder):
    """A page of the frontend; ``fmn_errors`` collects every uncaught error in it, and
    ``fmn_console`` what it calls an error on its console."""
    ARTEFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder,
            executable_path=os.environ.get("CHROMIUM_PATH") or None,
            viewport={"width": 1600, "height": 1000},
            args=QUIET,
        )
        context.set_default_timeout(PATIENCE)  # a busy machine is slow, not wrong
        context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        ours = url, "data:", "blob:"
        context.route(
            "**/*",
            lambda route: (
                route.continue_() if route.request.url.startswith(ours) else route.abort()
            ),
        )
        page = context.pages[0]
        page.fmn_errors = []
        page.on("pageerror", lambda error: page.fmn_errors.append(str(error)))
        page.fmn_console = []
        page.on("console", lambda message: keep(page.fmn_console, message))
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        yield page
        context.close()


def keep(said, message):
    text = f"{message.text} {message.location.get('url', '')}"
    if message.type == "error" and not any(each in text for each in NO_NETWORK):
        said.append(text)


def open_template(page, path, nodes_2, pause=1000):
    """Through the server's template route, as the Templates browser does."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    page.evaluate(
        """async name => {
          const answer = await fetch(`/api/workflow_templates/forget-me-not/${name}`);
          await app.loadGraphData(await answer.json());
        }""",
        path.name,
    )
    page.wait_for_timeout(pause)
