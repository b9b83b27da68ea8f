"""A bench that is stopped: by Ctrl-C, by SIGTERM, and when its parent is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fmn.bench.running.store import Store

ROOT = Path(__file__).resolve().parents[2]
TARGETS = "dog", "apple", "car", "guitar", "robot", "vampire", "mermaid", "blueprint"


def started(folder):
    """The command in a process of its own that has finished a cell, and its worker processes.

    Ctrl-C works there even if it is ignored here, as a shell makes it for what runs in the
    background.
    """
    options = "--count 2 --steps 2 --workers 1 --check= --measure pictures"
    command = [sys.executable, "-m", "fmn", "bench", *options.split(), "--target", *TARGETS]
    command += ["--method", "resteer:steps=2", "--out", str(folder)]
    log = folder / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=file,
            env=os.environ | {"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "0"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    store = folder / "cells.sqlite"
    while not (store.is_file() and done(store)):  # pytest's time limit bounds it
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    return process, workers


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for a child process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cancelled_run_keeps_what_is_done(number, tmp_path):
    """Ctrl-C or SIGTERM on the real command; the next run needs only the rest."""
    process, workers = started(tmp_path)
    try:
        process.send_signal(number)
        log = tmp_path / "log.txt"
        assert process.wait(60) == 130, log.read_text()
        assert "Cancelled" in log.read_text() and "Traceback" not in log.read_text()
        assert not psutil.wait_procs(workers, timeout=30)[1], "workers live on"
        assert (
            1 <= done(tmp_path / "cells.sqlite") < 3 * len(TARGETS)
        )  # untouched, training, re-steered
        assert not list(tmp_path.glob("*.tmp"))
    finally:
        end([process, *workers])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for a child process")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    process, workers = started(tmp_path)
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


def done(path):
    with Store(path) as store:
        return len(store)
