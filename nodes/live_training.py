"""What a training node shows while it runs: sent to the page, and kept for when it is reloaded."""

import math
import time
from collections import OrderedDict
from threading import Lock

import comfy.model_management
from aiohttp import web
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..fmn.images import jpeg_text

EVENT = "forget-me-not.train"
ROUTE = "/forget-me-not/train"
KEPT = 16  # nodes whose last state is kept
POINTS = 200  # of a curve
SECONDS = 0.25  # between two events
PICTURES, SIDE = 2, 256  # previews shown, and their pixels a side
TEXT = 200  # characters of a name or prompt
SENTENCE = 1000  # characters of an error, or of what is said of the memory

_states = OrderedDict()  # (client, workflow, node) -> state
_lock = Lock()  # nodes run in one thread, the server in another


class Live:
    """The state of one run of a training node. Use it as a context manager.

    Args:
        title: what is forgotten.
        workflow: id of the workflow that the page shows, or None.
    """

    def __init__(self, title, workflow):
        context, self.client = get_executing_context(), PromptServer.instance.client_id
        self.state = {
            "node": context.node_id, "prompt_id": context.prompt_id, "workflow": workflow,
            "title": title[:TEXT], "status": "running", "error": "", "note": "", "memory": "",
            "step": 0, "total": 0, "seconds_left": 0.0, "losses": [], "attention": [],
            "best": None, "previews": [], "previews_at": 0,
        }  # fmt: skip
        self.losses, self.attention, self.sent = Curve(), Curve(), 0.0

    def __enter__(self):
        self.send(pictures=True)
        return self

    def __exit__(self, kind, error, trace):
        cancelled = comfy.model_management.InterruptProcessingException
        ending = "cancelled" if kind and issubclass(kind, cancelled) else "failed"
        self.state |= {"status": ending if kind else "done", "seconds_left": 0.0}
        if kind and ending == "failed":
            # Not all errors say something.
            self.state["error"] = (str(error) or kind.__name__)[:SENTENCE]
        self.send(pictures=True)

    def step(self, step):
        """Take in a ``StepProgress``; sends it unless the last event was a moment ago."""
        if step.index < self.state["step"] or step.total != self.state["total"]:
            self.losses, self.attention = Curve(), Curve()  # another part of the work begins
        if not self.losses.points:  # a resumed run has losses behind it
            for index, loss in enumerate(step.losses[:-1], step.index - len(step.losses) + 1):
                self.losses.add(index, loss)
        self.losses.add(step.index, step.losses[-1])
        if step.attention_before and not self.attention.points:
            self.attention.add(0, step.attention_before.share)
            self.measured = step.attention_before
        if step.attention_before and step.attention_now is not self.measured:
            self.attention.add(step.index, step.attention_now.share)
            self.measured = step.attention_now
        self.state |= {
            "step": step.index, "total": step.total, "seconds_left": round(step.seconds_left, 1),
            "losses": self.losses.points, "attention": self.attention.points,
            "best": step.best_step, "memory": step.memory[:SENTENCE],
        }  # fmt: skip
        if step.index == step.total or time.monotonic() - self.sent >= SECONDS:
            self.send()

    def previews(self, rows, at):
        """Show pictures [(prompt, before, now)] that were drawn at a step."""
        self.state["previews_at"] = at
        self.state["previews"] = [
            {
                "prompt": prompt[:TEXT],
                "before": jpeg_text(before, SIDE),
                "now": jpeg_text(now, SIDE),
            }
            for prompt, before, now in rows[:PICTURES]
        ]
        self.send(pictures=True)

    def note(self, text):
        """A sentence below the curve."""
        self.state["note"] = text[:TEXT]

    def send(self, pictures=False):
        """Tell the page; without ``pictures`` it keeps those that it has."""
        if self.client is None:  # queued by a program that listens to nothing
            return
        self.sent, state = time.monotonic(), dict(self.state)
        with _lock:
            key = self.client, state["workflow"], state["node"]
            _states[key] = state
            _states.move_to_end(key)
            while len(_states) > KEPT:
                _states.popitem(last=False)
        event = state if pictures else {k: v for k, v in state.items() if k != "previews"}
        PromptServer.instance.send_sync(EVENT, event, self.client)


class Curve:
    """Points [index, value], thinned evenly so that there are never more than ``POINTS``."""

    def __init__(self):
        self.points, self.every, self.last = [], 1, None

    def add(self, index, value):
        if not math.isfinite(value):  # JSON has no word for it
            return
        if self.last is not None and self.last % self.every:
            self.points.pop()  # the newest stays until the next one comes, then it is thinned
        self.points = [*self.points, [index, float(f"{value:.6g}")]]
        self.last = index
        if len(self.points) > POINTS:
            self.every *= 2
            self.points = [p for p in self.points if p[0] % self.every == 0 or p[0] == index]


def add_routes(routes):
    """``GET /forget-me-not/train?client=ID``: the last states of what that page queued."""

    @routes.get(ROUTE)
    async def states(request):
        client = request.rel_url.query.get("client")
        with _lock:
            found = [state for (owner, *_), state in _states.items() if owner == client]
        return web.json_response({"states": found}, headers={"Cache-Control": "no-store"})
