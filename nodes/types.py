"""Socket types of the pack, and the text under a node."""

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

CATEGORY = "forget-me-not"
EVENT = "forget-me-not.text"
Concepts = io.Custom("FMN_CONCEPT")  # list of fmn.concepts.concept.Concept
Method = io.Custom("FMN_METHOD")  # a method's settings
Options = io.Custom("FMN_OPTIONS")  # nodes.train.Options
Keep = io.Custom("FMN_KEEP")  # tuple of words and prompts
Learned = io.Custom("FMN_EMBEDDING")  # fmn.embedding.Embedding
Patch = io.Custom("FORGET_PATCH")  # fmn.patches.patch.ForgetPatch
Patches = io.Custom(
    "FMN_PATCHES"
)  # list of (fmn.patches.patch.ForgetPatch or path of its file, strength)


def told(text, answer=None):
    """What a node says when it is done, as its ``ui``: web/told.js shows it below the node, and
    shows it again if the result was still there.

    Args:
        answer: what programs find as ``text`` in the history, if that is not the same.
    """
    return {"told": (text,), "text": (text if answer is None else answer,)}


def show_text(text):
    """Show a text under the node that is running; ``told`` takes its place when it is done."""
    server = PromptServer.instance
    if server.client_id is not None:  # else queued by a program that listens to nothing
        node = get_executing_context().node_id
        data = {"node": node, "workflow": workflow_id(), "text": text}
        server.send_sync(EVENT, data, server.client_id)


def workflow_id():
    """The id of the workflow on the page that queued what is running, or None."""
    running = PromptServer.instance.prompt_queue.currently_running.values()
    prompt_id = get_executing_context().prompt_id
    info = next((extra for _, key, _, extra, *_ in running if key == prompt_id), None)
    for name in ("extra_pnginfo", "workflow", "id"):  # sent by whoever queued it
        info = info.get(name) if isinstance(info, dict) else None
    return info[:64] if isinstance(info, str) else None
