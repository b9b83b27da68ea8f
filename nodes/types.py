"""Socket types of the pack, and the text under a node."""

import re

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from server import PromptServer

CATEGORY = "forget-me-not"
# Signs that mean something in HTML or Markdown, or make a link. As entities they do in neither.
MARKUP = r"[&<>\\`*_~#|!\[\]@]|:(?=//)|(?<=www)\."
Concepts = io.Custom("FMN_CONCEPT")  # list of fmn.concept.Concept
Method = io.Custom("FMN_METHOD")  # a method's settings
Options = io.Custom("FMN_OPTIONS")  # nodes.training.Options
Keep = io.Custom("FMN_KEEP")  # tuple of words and prompts
Learned = io.Custom("FMN_EMBEDDING")  # fmn.embedding.Embedding
Patch = io.Custom("FORGET_PATCH")  # fmn.patch.ForgetPatch
Patches = io.Custom("FMN_PATCHES")  # list of (fmn.patch.ForgetPatch or path of its file, strength)


def told(text, answer=None):
    """What a node says when it is done, as its ``ui``: web/told.js shows it below the node, and
    shows it again if the result was still there.

    Args:
        answer: what programs find as ``text`` in the history, if that is not the same.
    """
    return {"told": (text,), "text": (text if answer is None else answer,)}


def show_text(text):
    """Show a text under the node that is running, for as long as it does.

    ComfyUI's page renders it as HTML, in Nodes 2.0 as Markdown, and names in a downloaded patch are
    a stranger's words.
    """
    escaped = re.sub(MARKUP, lambda sign: f"&#{ord(sign[0])};", text, flags=re.IGNORECASE)
    escaped = escaped.replace("\n", "  \n")  # so that Markdown keeps the lines, too
    PromptServer.instance.send_progress_text(escaped, get_executing_context().node_id)
