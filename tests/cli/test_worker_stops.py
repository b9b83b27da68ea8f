"""Commands with worker processes that are stopped: by Ctrl-C, by SIGTERM, and when their parent is
killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from fmn.bench.running.store import Store

from .test_signals import ROOT, start

TARGETS = "dog", "apple", "car", "guitar", "robot", "vampire", "mermaid", "blueprint"
COMMANDS = {
    "bench": (
        "--count 2 --steps 2 --check= --measure pictures --method resteer:steps=2 --target "
        + " ".join(TARGETS)
    ),
    "batch": "list.txt --model demo --method resteer --steps 10",
}
ALL = {"bench": 3 * len(TARGETS), "batch": len(TARGETS)}  # untouched, training, re-steered
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to a child")


def started(folder, command):
    """The command in a process of its own that has finished something, and its workers."""
    (folder / "list.txt").write_text("\n".join(TARGETS))
    log = folder / "log.txt"
    with open(log, "wb") as file:
        options = *COMMANDS[command].split(), "--workers", "2", "--out", "out"
        process = start(folder, command, *options, stderr=file)
    while not done(folder, command):  # pytest's time limit bounds it
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    return process, workers


@pytest.mark.parametrize("command, sent", [("bench", signal.SIGTERM), ("batch", signal.SIGINT)])
def test_a_cancelled_run_keeps_what_is_done(command, sent, tmp_path):
    """The next run needs only the rest."""
    process, workers = started(tmp_path, command)
    try:
        process.send_signal(sent)
        log = tmp_path / "log.txt"
        assert process.wait(60) == 130, log.read_text()
        assert "Cancelled" in log.read_text() and "Traceback" not in log.read_text()
        assert not psutil.wait_procs(workers, timeout=30)[1], "workers live on"
        assert 1 <= done(tmp_path, command) < ALL[command]
        assert not list(tmp_path.rglob("*.tmp"))
    finally:
        end([process, *workers])


PARENT = """
import time
from fmn.jobs.executors import Processes
processes = Processes(1)
processes.submit(time.sleep, 0).result()
print("ready", flush=True)
processes.submit(time.sleep, 600).result()
"""


def test_workers_end_when_their_parent_is_killed():
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"ready"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    try:
        process.kill()
        process.wait(60)
        assert not psutil.wait_procs(workers, timeout=30)[1], "workers live on"
    finally:
        end([process, *workers])


def end(processes):
    for process in processes:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()


def done(folder, command):
    """Finished cells, or patches."""
    store = folder / "out" / "cells.sqlite"
    if command == "batch":
        return len(list((folder / "out").glob("*.safetensors")))
    if not store.is_file():
        return 0
    with Store(store) as cells:
        return len(cells)
