"""Drive a real ComfyUI server over HTTP and websocket."""

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import numpy as np
from PIL import Image
from websocket import WebSocketTimeoutException, create_connection

START_TIMEOUT = 300
# Another frontend than the installed one: the folder static of an unpacked package.
FRONTEND = [f"--front-end-root={path}" for path in [os.environ.get("FRONTEND")] if path]
LATE = 100  # steps that may be told of after Cancel: they were done before the server took it


def texts(messages):
    """What nodes said while they ran."""
    return [data["text"] for kind, data in messages if kind == "forget-me-not.text"]


def refusal_of(node, *others):
    """What refused a prompt, in the form of a failed run."""
    said = "; ".join(error["details"] for error in node["errors"])
    return {"exception_message": said, "node_type": node["class_type"]}


class PromptError(Exception):
    """The server ran a node that failed, or refused to run it; holds the message a user would
    see."""

    def __init__(self, data):
        super().__init__(data.get("exception_message", ""))
        self.data = data


class Interrupted(Exception):
    """The run was cancelled."""


class Server:
    """``main.py --cpu`` in a process of its own; use it as a context manager."""

    def __init__(self, comfyui, base, *arguments):
        self.comfyui, self.base, self.arguments = Path(comfyui), Path(base), arguments
        self.client = uuid.uuid4().hex

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = open(self.base / "server.log", "ab")
        self.process = subprocess.Popen(
            [
                sys.executable, "main.py", "--cpu", "--port", str(self.port),
                "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                "--disable-auto-launch", "--disable-api-nodes", *FRONTEND, *self.arguments,
            ],
            cwd=self.comfyui, stdout=self.log, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._wait_until_up()
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}"
        self.socket = create_connection(address, timeout=600)
        return self

    def __exit__(self, *exception):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.log.close()

    def _wait_until_up(self):
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log_text()[-4000:]}")
            try:
                return self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI is not up after {START_TIMEOUT} s:\n{self.log_text()[-4000:]}")

    def log_text(self):
        return (self.base / "server.log").read_text(errors="replace")

    def get(self, path, **query):
        address = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=60) as answer:
            data = answer.read()
        return json.loads(data) if data[:1] in (b"{", b"[") else data

    def post(self, path, content):
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            data = answer.read()
        return json.loads(data) if data else None

    def queue(self, prompt):
        """Start a workflow in API form; returns its id."""
        content = {"prompt": prompt, "client_id": self.client}
        try:
            return self.post("/prompt", content)["prompt_id"]
        except urllib.error.HTTPError as error:  # a node has refused what it shall work with
            told = json.loads(error.read())["node_errors"].values()
            raise PromptError(refusal_of(*told)) from error

    def events(self, prompt_id):
        """Messages of a run until it ends: (type, data) or ("binary", bytes)."""
        while True:
            try:
                message = self.socket.recv()
            except WebSocketTimeoutException:
                raise RuntimeError(f"no word from ComfyUI:\n{self.log_text()[-2000:]}") from None
            if isinstance(message, bytes):
                yield "binary", message
                continue
            event = json.loads(message)
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") not in (None, prompt_id):
                continue
            if kind == "execution_error":
                raise PromptError(data)
            if kind == "execution_interrupted":
                raise Interrupted
            yield kind, data
            if kind == "executing" and data["node"] is None:
                return

    def run(self, prompt):
        """Run a workflow to its end; returns the outputs of its nodes."""
        prompt_id = self.queue(prompt)
        for _ in self.events(prompt_id):
            pass
        return self.history(prompt_id)["outputs"]

    def history(self, prompt_id, patience=60):
        """What became of a run, at most so many seconds later: a page hears of its end before the
        server has noted it."""
        deadline = time.monotonic() + patience
        while prompt_id not in (known := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise RuntimeError(f"no end of {prompt_id}:\n{self.log_text()[-2000:]}")
            time.sleep(0.1)
        return known[prompt_id]

    def image(self, output):
        """The first picture of a node's output, float [H, W, 3] in 0..1."""
        entry = output["images"][0]
        names = {key: entry[key] for key in ("filename", "subfolder", "type")}
        picture = Image.open(io.BytesIO(self.get("/view", **names))).convert("RGB")
        return np.asarray(picture).astype(np.float32) / 255
