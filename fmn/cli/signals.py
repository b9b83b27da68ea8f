"""What the operating system tells a command: to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _cancel(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def sigterm_cancels() -> Iterator[None]:
    """SIGTERM (from a service manager, or a container's stop) cancels the command as Ctrl-C does.

    Python installs handlers in the main thread only, so other threads are left as they are, and so
    is a SIGTERM that the parent process chose to ignore.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) in (signal.SIG_IGN, None):
        yield
        return
    before = signal.signal(signal.SIGTERM, _cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
