"""Signals: in the training loop, which `train.catch_signals` ends after a step, and Ctrl-C
elsewhere."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once, with a line and the status of the signal, 130: an
    exception, which Python would raise, is lost where it meets a callback of a library."""

    def stop(number, frame):
        os.write(2, b"Interrupted.\n")
        os._exit(128 + number)

    with handled(stop, signal.SIGINT):
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Within, Ctrl-C does no more than to be in the list that this yields."""
    caught = []
    with handled(lambda number, frame: caught.append(number), signal.SIGINT):
        yield caught


@contextlib.contextmanager
def handled(handler: Callable, *numbers: int) -> Iterator[None]:
    """Within, a handler takes the signals of these numbers, but those that are ignored; in another
    thread than the main one, which cannot handle any, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
