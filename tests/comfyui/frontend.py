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
READY = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.FMN_Concept"


@contextmanager
def opened(url, folder):
    """A page of the frontend; ``fmn_errors`` collects every uncaught error in it."""
    ARTEFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            folder,
            executable_path=os.environ.get("CHROMIUM_PATH") or None,
            viewport={"width": 1600, "height": 1000},
            args=QUIET,
        )
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
        page.goto(url, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function(READY, timeout=120_000)
        yield page
        context.close()


def open_template(page, path, nodes_2):
    """Through the server's template route, as the Templates browser does."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", nodes_2)
    page.evaluate(
        """async name => {
          const answer = await fetch(`/api/workflow_templates/forget-me-not/${name}`);
          await app.loadGraphData(await answer.json());
        }""",
        path.name,
    )
    page.wait_for_timeout(1000)
