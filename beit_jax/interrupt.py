"""What Ctrl-C does outside of the training loop, which ends by itself, see `train.py`."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once, with a line and the status of the signal, 130: an
    exception, which Python would raise, is lost where it meets a callback of a library."""

    def stop(number, frame):
        os.write(2, b"Interrupted.\n")
        os._exit(128 + number)

    with _handled(stop):
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Within, Ctrl-C does no more than to be in the list that this yields."""
    caught = []
    with _handled(lambda number, frame: caught.append(number)):
        yield caught


@contextlib.contextmanager
def _handled(handler):
    """Nothing, where it is ignored, or in another thread, which cannot handle it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    old = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
