"""SIGTERM cancels a command as Ctrl-C does."""

import os
import signal
import threading

import pytest

from fmn.cli.signals import sigterm_cancels

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGTERM")


@pytest.fixture
def handler():
    """A handler that notes SIGTERM, in place of the one that would end the tests."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_sigterm_cancels_and_the_handler_comes_back(handler):
    with pytest.raises(KeyboardInterrupt), sigterm_cancels():
        signal.raise_signal(signal.SIGTERM)
    assert not handler
    signal.raise_signal(signal.SIGTERM)
    assert handler == [signal.SIGTERM]


def test_a_sigterm_that_is_ignored_stays_ignored(handler):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_cancels():
        signal.raise_signal(signal.SIGTERM)


def test_another_thread_than_the_main_one_changes_nothing(handler):
    handlers = []

    def work():
        with sigterm_cancels():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert handlers == [before]
