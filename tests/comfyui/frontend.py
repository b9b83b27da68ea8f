"""The real frontend in Chromium, and the examples it opens."""

import os
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
ARTEFACTS = ROOT / "test-artifacts"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
# What the frontend asks for and tests do not have: its own templates, and descriptions of packs.
NO_NETWORK = ("/templates/index.json", "core workflow templates", "https://api.comfy.org/")
# What a frontend that is newer than the server asks it for.
NEWER = ("404 (Not Found)", "JobsApiError", "huggingface.co") if os.environ.get("FRONTEND") else ()
PATIENCE = 120_000  # ms
expect.set_options(timeout=PATIENCE)
ACTIVE = "window.app?.extensionManager?.workflow?.activeWorkflow?.key"
# The page opens its last workflow after it knows the nodes: what is put into the graph before that
# would be lost.
READY = f"() => window.LiteGraph?.registered_node_types?.FMN_Concept && {ACTIVE}"


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
    if message.type == "error" and not any(each in text for each in NO_NETWORK + NEWER):
        said.append(text)


def setting(page, name, value):
    page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])


def dress(page, nodes_2, palette="dark"):
    """Choose how nodes are drawn, and the theme; returns once the page wears it."""
    setting(page, "Comfy.VueNodes.Enabled", nodes_2)
    setting(page, "Comfy.ColorPalette", palette)
    page.wait_for_function(
        "dark => (parseInt(LiteGraph.NODE_DEFAULT_BGCOLOR.slice(1, 3), 16) < 128) === dark",
        arg=palette == "dark",
    )


@contextmanager
def another_workflow(page):
    """Left once the page has opened a workflow, and is done with it."""
    before = page.evaluate(ACTIVE)
    yield
    page.wait_for_function(f"before => {ACTIVE} && {ACTIVE} !== before", arg=before)


def open_prompt(page, prompt, nodes_2=False):
    """A workflow in API form as a graph on the page; returns once all nodes are drawn."""
    with another_workflow(page):
        page.evaluate("prompt => app.loadApiJson(prompt, `prompt ${performance.now()}`)", prompt)
    all_nodes(page, nodes_2)


def all_nodes(page, nodes_2):
    """Wait until as many elements of nodes are on the page as belong there."""
    page.wait_for_function(
        """on => app.graph.nodes.length && document.querySelectorAll('[data-node-id]').length
                 === (on ? app.graph.nodes.length : 0)""",
        arg=nodes_2,
    )


def open_template(page, path, nodes_2, pause=1000):
    """Through the server's template route, as the Templates browser does."""
    setting(page, "Comfy.VueNodes.Enabled", nodes_2)
    page.evaluate(
        """async name => {
          const answer = await fetch(`/api/workflow_templates/forget-me-not/${name}`);
          await app.loadGraphData(await answer.json());
        }""",
        path.name,
    )
    page.wait_for_timeout(pause)
