"""Ctrl-C, SIGTERM and a reader that goes away end every command quietly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmn.cli import main
from fmn.hosts.diffusers.model import DiffusersModel

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "demo" / "patches" / "santa_claus.safetensors"
WAIT = 60  # seconds
TRAINING = "--method", "resteer", "--steps", "5000"
COMMANDS = {
    "forget": ("forget", "demo", "dog", *TRAINING, "--out", "a.safetensors"),
    "batch": ("batch", "list.txt", "--model", "demo", *TRAINING, "--out", "patches"),
    "apply": ("apply", "demo", PATCH, "--prompt", "a dog", "--steps", "1000", "--out", "a.png"),
    "merge": ("merge", PATCH, "--how", "joint", "--model", "demo", "--out", "a.safetensors"),
    "demo": ("demo", "--out", "demo"),
    "bench": ("bench", "--out", "bench"),
}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to a child")


def start(folder, *arguments, ignore_sigint=False, **streams):
    """A command in ``folder``, with the signals of a terminal whatever this process ignores."""

    def set_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignore_sigint else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "fmn", *map(str, arguments)],
        cwd=folder, text=True, preexec_fn=set_signals,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),
    )  # fmt: skip


def wait_for(process, words):
    """Read standard error until it holds the words; pytest's time limit bounds it."""
    seen = ""
    for part in iter(lambda: process.stderr.read(1), ""):
        seen += part
        if words in seen:
            return
    raise AssertionError(f"it ended before it wrote {words!r}: {seen[-2000:]}")


def end(process):
    """(exit code, rest of standard error); it is killed if it does not end."""
    try:
        _, error = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    return process.returncode, error


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "list.txt").write_text("dog\n")
    return tmp_path


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_cancels_every_command(folder, monkeypatch, capsys, command, sent):
    """In this process, where its model would be loaded."""
    signals = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(DiffusersModel, "load", lambda *_, **__: signal.raise_signal(sent))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main([*map(str, COMMANDS[command])]) == 130
    finally:
        signal.signal(signal.SIGINT, signals[signal.SIGINT])
    assert "Cancelled; no unfinished file was left." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signals[signal.SIGTERM]


@pytest.mark.parametrize(
    "command, sent",
    [("forget", signal.SIGINT), ("batch", signal.SIGTERM), ("apply", signal.SIGTERM)],
)
def test_a_signal_at_work_leaves_no_file(folder, command, sent):
    process = start(folder, *COMMANDS[command])
    wait_for(process, "%|")  # of the progress bar
    process.send_signal(sent)
    code, error = end(process)
    assert code == 130 and "Cancelled; no unfinished file was left." in error
    assert "Traceback" not in error
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["list.txt"]


def test_sigint_that_the_parent_ignores_stays_ignored(folder):
    """As of a shell's background job; SIGTERM still ends it."""
    process = start(folder, *COMMANDS["forget"], ignore_sigint=True)
    wait_for(process, "%|")
    process.send_signal(signal.SIGINT)
    wait_for(process, "attention")  # it goes on
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130


SHORT = {
    "--help": ("--help",),
    "inspect": ("inspect", PATCH),
    "an error as JSON": ("inspect", "nothing", "--json"),
}


@pytest.mark.parametrize("command", SHORT)
def test_a_closed_pipe_ends_quietly(folder, command):
    """``fmn inspect FILE | true``: no traceback, and the exit code of SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    process = start(folder, *SHORT[command], stdout=write)
    os.close(write)
    code, error = end(process)
    # argparse ignores that its help finds no reader.
    assert code == (0 if command == "--help" else 141)
    assert "Traceback" not in error and "BrokenPipe" not in error


def test_a_closed_pipe_of_the_progress_bar_ends_quietly(folder):
    read, write = os.pipe()
    os.close(read)
    process = start(folder, *COMMANDS["forget"], stdout=write, stderr=write)
    os.close(write)
    process.wait(WAIT)
    assert process.returncode == 141 and not (folder / "a.safetensors").exists()


def test_a_broken_pipe_within_a_command_is_no_closed_output(monkeypatch):
    def broken(options):
        raise BrokenPipeError("of a worker process")

    monkeypatch.setattr(main, "_methods", broken)
    with pytest.raises(BrokenPipeError, match="worker"):
        main.main(["methods"])
