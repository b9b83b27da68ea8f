"""What a training node shows while it runs: sent to the page, and kept for when it is reloaded."""

import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypedDict

from aiohttp import web
from comfy.model_management import InterruptProcessingException
from PIL import Image
from server import PromptServer

from ..fmn.images import jpeg_text
from ..fmn.progress import ConceptAttention, StepProgress
from .page import Page, queueing_page

EVENT = "forget-me-not.train"
ROUTE = "/forget-me-not/train"
MOST_NODES = 16  # whose last state is kept
MOST_POINTS = 200  # of a curve
SECONDS = 0.25  # between two events
PICTURES, SIDE = 2, 256  # previews shown, and their pixels a side
NAME = 200  # characters of a name or prompt
SENTENCE = 1000  # characters of an error, or of the note on memory

Points = tuple[tuple[int, float], ...]  # of a curve: (step, value)


class Preview(TypedDict):
    prompt: str
    before: str  # both a JPEG in base64
    now: str


@dataclass
class TrainingState:
    """What web/train.js draws. Values are replaced, never changed: the server's thread reads them
    while the node goes on."""

    title: str
    status: str = "running"  # or "done", "cancelled", "failed"
    error: str = ""
    note: str = ""
    outcome: str = ""  # what the patch did
    memory: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float = 0.0
    losses: Points = ()
    attention: Points = ()
    best: int | None = None  # the step that is kept
    previews: tuple[Preview, ...] = ()
    previews_at: int = 0


class TrainingStates:
    """The last state of each node, for pages that are loaded again. The node's thread adds them,
    the server's reads them."""

    def __init__(self, most: int = MOST_NODES) -> None:
        self.most, self._lock = most, Lock()
        self._states: OrderedDict[tuple[str, str | None, str], dict[str, Any]] = OrderedDict()

    def keep(self, page: Page, state: dict[str, Any]) -> None:
        key = page.client, page.workflow, page.node
        with self._lock:
            self._states[key] = state
            self._states.move_to_end(key)
            while len(self._states) > self.most:
                self._states.popitem(last=False)

    def of(self, client: str | None) -> list[dict[str, Any]]:
        """The states of what a page queued, oldest first."""
        with self._lock:
            return [state for (owner, *_), state in self._states.items() if owner == client]


STATES = web.AppKey("forget-me-not.trainings", TrainingStates)


def start(server: PromptServer) -> None:
    """Add ``GET /forget-me-not/train?client=ID``: the last states of what that page queued."""
    states = server.app[STATES] = TrainingStates()

    @server.routes.get(ROUTE)
    async def answer(request: web.Request) -> web.Response:
        content = {"states": states.of(request.rel_url.query.get("client"))}
        return web.json_response(content, headers={"Cache-Control": "no-store"})


class LiveTraining:
    """One run of a training node, shown on the page that queued it. Use it as a context manager.

    Args:
        title: names of what is forgotten.
    """

    def __init__(self, title: str) -> None:
        self.page, self.state = queueing_page(), TrainingState(title[:NAME])
        self.losses, self.attention = Curve(), Curve()
        self.sent = 0.0
        self.measured: ConceptAttention | None = None

    def __enter__(self) -> "LiveTraining":
        self.send(pictures=True)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.state.status, self.state.seconds_left = "done", 0.0
        if error is not None:
            self.state.outcome = ""
        if isinstance(error, InterruptProcessingException):
            self.state.status = "cancelled"
        elif error is not None:
            self.state.status = "failed"
            self.state.error = (str(error) or type(error).__name__)[:SENTENCE]
        self.send(pictures=True)

    def step(self, step: StepProgress) -> None:
        """Take in a step; it is sent unless the last event was a moment ago."""
        if step.index < self.state.step or step.total != self.state.total:
            self.losses, self.attention = Curve(), Curve()  # another part of the work begins
        self._extend_curves(step)
        self.state.step, self.state.total = step.index, step.total
        self.state.seconds_left = round(step.seconds_left, 1)
        self.state.losses, self.state.attention = self.losses.points, self.attention.points
        self.state.best, self.state.memory = step.best_step, step.memory[:SENTENCE]
        if step.index == step.total or time.monotonic() - self.sent >= SECONDS:
            self.send()

    def _extend_curves(self, step: StepProgress) -> None:
        if not self.losses.points:  # a resumed run brings its earlier losses
            for index, loss in enumerate(step.losses[:-1], step.index - len(step.losses) + 1):
                self.losses.add(index, loss)
        self.losses.add(step.index, step.losses[-1])
        before, now = step.attention_before, step.attention_now
        if before and not self.attention.points:
            self.attention.add(0, before.share)
            self.measured = before
        if now and now is not self.measured:
            self.attention.add(step.index, now.share)
            self.measured = now

    def previews(self, rows: list[tuple[str, Image.Image, Image.Image]], at: int) -> None:
        """Show rows of (prompt, picture before training, picture at step ``at``)."""
        self.state.previews_at = at
        self.state.previews = tuple(
            Preview(prompt=p[:NAME], before=jpeg_text(before, SIDE), now=jpeg_text(now, SIDE))
            for p, before, now in rows[:PICTURES]
        )
        self.send(pictures=True)

    def note(self, text: str) -> None:
        """Show a sentence below the curve, from the next event on."""
        self.state.note = text[:NAME]

    def outcome(self, text: str) -> None:
        """Show what the patch did, or that this is being measured."""
        self.state.outcome = text[:SENTENCE]
        self.send()

    def send(self, pictures: bool = False) -> None:
        """Send the state; without ``pictures`` the page keeps the previews that it has."""
        page = self.page
        if page is None:
            return
        self.sent = time.monotonic()
        state = page.run() | vars(self.state)
        page.server.app[STATES].keep(page, state)
        page.send(EVENT, state if pictures else {k: state[k] for k in state if k != "previews"})


class Curve:
    """Points (step, value), thinned evenly so that there are never more than ``MOST_POINTS``."""

    def __init__(self) -> None:
        self.points: Points = ()
        self.every, self.last = 1, 0

    def add(self, index: int, value: float) -> None:
        if not math.isfinite(value):  # JSON has no word for it
            return
        # The newest point always stays; it is thinned out when the next one comes.
        kept = self.points[:-1] if self.last % self.every else self.points
        self.points, self.last = (*kept, (index, float(f"{value:.6g}"))), index
        if len(self.points) > MOST_POINTS:
            self.every *= 2
            self.points = tuple(p for p in self.points if p[0] % self.every == 0 or p[0] == index)
