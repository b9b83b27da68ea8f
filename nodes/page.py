"""The server, and the browser page that queued the run: what a node shows on it as text."""

from typing import Any, NamedTuple

from comfy_execution.utils import get_executing_context
from server import PromptServer

EVENT = "forget-me-not.text"
NO_ID = "00000000-0000-0000-0000-000000000000"  # of all workflows opened from API files


def running_server() -> PromptServer | None:
    """The server of this process; None in tools and tests that import the pack without one."""
    return getattr(PromptServer, "instance", None)


class Page(NamedTuple):
    """The page that queued the run, and the node that is running."""

    server: PromptServer
    client: str
    node: str  # its id; "7:3" in the subgraph of node 7
    prompt_id: str
    workflow: str | None  # id of the workflow that was queued
    nodes: tuple[str, ...]  # "ID TYPE" of each of its nodes, if that id is NO_ID

    def run(self) -> dict[str, Any]:
        """What tells web/workflow.js which node is meant."""
        names = ("node", "prompt_id", "workflow", "nodes")
        return {name: getattr(self, name) for name in names}

    def send(self, event: str, data: dict[str, Any]) -> None:
        self.server.send_sync(event, data, self.client)


def queueing_page() -> Page | None:
    """None where nobody listens: without a server, and for runs that a program queued."""
    server, context = running_server(), get_executing_context()
    if server is None or context is None or server.client_id is None:
        return None
    workflow = _workflow(server, context.prompt_id)
    return Page(server, server.client_id, context.node_id, context.prompt_id, *workflow)


def _workflow(server: PromptServer, prompt_id: str) -> tuple[str | None, tuple[str, ...]]:
    """The id of the workflow that is running, and its nodes if the id says nothing."""
    running = server.prompt_queue.currently_running.values()
    found = ((prompt, extra) for _, key, prompt, extra, *_ in running if key == prompt_id)
    prompt, info = next(found, ({}, None))
    for name in ("extra_pnginfo", "workflow", "id"):  # untrusted: whoever queued it sent it
        info = info.get(name) if isinstance(info, dict) else None
    if info == NO_ID:
        return info, tuple(f"{key} {node['class_type']}" for key, node in prompt.items())
    return info[:64] if isinstance(info, str) else None, ()


def show_text(text: str) -> None:
    """Show a text below the running node until its ``text_output`` replaces it."""
    page = queueing_page()
    if page is not None:
        page.send(EVENT, page.run() | {"text": text})


def text_output(text: str, value: str | None = None) -> dict[str, tuple[str]]:
    """A node's ``ui``: the text that web/node_text.js shows below it, also for cached results.

    Args:
        value: what programs read as ``text`` in the history; the same text by default.
    """
    return {"node_text": (text,), "text": (text if value is None else value,)}
