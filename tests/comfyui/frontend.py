"""The real frontend in Chromium, and the examples it opens."""

import os
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

from playwright.sync_api import Error, expect

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "example_workflows").glob("*.json"))
ARTEFACTS = ROOT / "test-artifacts"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    # Nothing from elsewhere. (Not by a route: all that the page loads would wait for this process.)
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server",
]  # fmt: skip
# What the frontend asks for and tests do not have: its own templates, and descriptions of packs.
NO_NETWORK = ("/templates/index.json", "core workflow templates", "https://api.comfy.org/")
# What a frontend that is newer than the server asks it for.
NEWER = ("404 (Not Found)", "JobsApiError", "huggingface.co") if os.environ.get("FRONTEND") else ()
PATIENCE = 60_000  # ms
START = 2 * PATIENCE  # of a page
expect.set_options(timeout=PATIENCE)
ACTIVE = "window.app?.extensionManager?.workflow?.activeWorkflow?.key"
# The page opens its last workflow after it knows the nodes: what is put into the graph before that
# would be lost.
READY = f"() => window.LiteGraph?.registered_node_types?.FMN_Concept && {ACTIVE}"
# What may tell why a test failed.
STATE = """async () => {
  const texts = selector => [...document.querySelectorAll(selector)].map(
    each => `${each.hidden ? 'hidden: ' : ''}${each.innerText.slice(0, 300)}`);
  const queue = await (await fetch('/queue')).json();
  const frame = new Promise(done => requestAnimationFrame(() => done('drawn')));
  const late = new Promise(done => setTimeout(() => done('not drawn for 2 s'), 2000));
  return {
    frame: await Promise.race([frame, late]),
    focus: document.activeElement?.cloneNode(false).outerHTML.slice(0, 300),
    dialogs: texts('[role=dialog]'), toasts: texts('.p-toast-message'),
    running: queue.queue_running.map(each => each[1]), waiting: queue.queue_pending.length,
    graph: app.graph.id, client: app.api.clientId, socket: app.api.socket?.readyState,
    nodes: app.graph.nodes.map(each => `${each.id} ${each.type}`),
    elements: document.querySelectorAll('[data-node-id]').length,
    ours: texts('.fmn-train .fmn-content, .fmn-node-text .fmn-content'),
    places: app.graph.nodes.flatMap(each => each.widgets ?? [])
      .filter(each => each.type?.startsWith('FMN_'))
      .map(each => `${each.type} ${each.element?.isConnected} ${each.element?.hidden}`),
    trained: (await (await fetch(`/forget-me-not/train?client=${app.api.clientId}`)).json())
      .states.map(each => `${each.workflow} ${each.node} ${each.status}`),
  };
}"""
# Resolves once nothing has moved for half a second's worth of frames, and nothing is fading.
AT_REST = """async frames => {
  const start = performance.now();
  const selector = '[data-node-id], .fmn-shelf, .p-toast-message, [role=dialog]';
  const look = () => JSON.stringify([
    app.canvas.ds.scale, ...app.canvas.ds.offset,
    app.graph.nodes.map(node => [...node.pos, ...node.size]),
    [...document.querySelectorAll(selector)].map(each => each.getBoundingClientRect()),
  ]);
  const fading = () => document.getAnimations().some(each =>
    each.playState === 'running' && each.effect.getComputedTiming().endTime !== Infinity);
  let before = '', still = 0;
  while (still < frames) {
    if (performance.now() - start > 60_000) throw new Error('the page does not come to rest');
    await new Promise(done => requestAnimationFrame(done));
    const now = look();
    still = now === before && !fading() ? still + 1 : 0;
    before = now;
  }
}"""
STOP = """async () => {
  const post = (path, content) => fetch(path, { method: 'POST', body: JSON.stringify(content),
    headers: { 'Content-Type': 'application/json' } });
  await post('/queue', { clear: true });
  await post('/interrupt', {});
}"""


def launched(chromium, folder):
    """A Chromium that keeps what it has loaded and compiled in ``folder``."""
    context = chromium.launch_persistent_context(
        folder,
        executable_path=os.environ.get("CHROMIUM_PATH") or None,
        viewport={"width": 1600, "height": 1000},
        args=QUIET,
    )
    context.set_default_timeout(PATIENCE)  # a busy machine is slow, not wrong
    context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
    return context


def opened(context, url):
    """A page of the frontend that knows nothing of earlier ones; ``fmn_errors`` collects every
    uncaught error in it, and ``fmn_console`` what it calls an error on its console."""
    ARTEFACTS.mkdir(exist_ok=True)
    page = context.new_page()
    for other in context.pages[:-1]:
        other.close()
    page.goto(f"{url}/system_stats")
    page.evaluate("localStorage.clear()")
    page.fmn_errors, page.fmn_console = [], []
    page.on("pageerror", lambda error: page.fmn_errors.append(str(error)))
    page.on("console", lambda message: keep(page.fmn_console, message))
    page.goto(url, wait_until="domcontentloaded", timeout=START)
    page.wait_for_function(READY, timeout=START)
    return page


def keep(said, message):
    text = f"{message.text} {message.location.get('url', '')}"
    if message.type == "error" and not any(each in text for each in NO_NETWORK + NEWER):
        said.append(text)


def told_of(page, name):
    """A failed test's page in words and as a picture; then the page is loaded anew."""
    console = [line[:500] for line in page.fmn_console if "404 (Not Found)" not in line]
    told = [f"errors: {page.fmn_errors}", f"console: {console[-5:]}"]
    try:  # the picture first: a page that hangs says so after a while
        page.screenshot(path=ARTEFACTS / f"failed {name.replace('/', '_')}.png", timeout=20_000)
        told += [f"{key}: {value}" for key, value in page.evaluate(STATE).items()]
        page.evaluate(STOP)
        idle(page)
        page.goto(page.url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        page.fmn_errors.clear()
        page.fmn_console.clear()
    except (Error, AssertionError) as error:
        told.append(f"and then: {error}")
    return "\n".join(told)


def idle(page):
    """Wait until the server does nothing: nodes tell of their end before their run has ended."""
    deadline = time.monotonic() + PATIENCE / 1000
    while any(page.request.get(urljoin(page.url, "/queue")).json().values()):
        assert time.monotonic() < deadline, "the server is still at work"
        time.sleep(0.1)


def at_rest(page, frames=30):
    """Wait until nothing on the page has moved for so many frames."""
    page.evaluate(AT_REST, frames)


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


def open_template(page, path, nodes_2):
    """Through the server's template route, as the Templates browser does."""
    setting(page, "Comfy.VueNodes.Enabled", nodes_2)
    page.evaluate(
        """async name => {
          const answer = await fetch(`/api/workflow_templates/forget-me-not/${name}`);
          await app.loadGraphData(await answer.json());
        }""",
        path.name,
    )
    all_nodes(page, nodes_2)
