"""What signals do: in the training loop, which `train.catch_signals` ends after a step, and Ctrl-C
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

    with _unless_ignored(stop):
        yield


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Within, Ctrl-C does no more than to be in the list that this yields."""
    caught = []
    with _unless_ignored(lambda number, frame: caught.append(number)):
        yield caught


@contextlib.contextmanager
def handled(handler: Callable, *numbers: int) -> Iterator[None]:
    """Within, a handler takes the signals of these numbers."""
    old = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _unless_ignored(handler):
    """Ctrl-C handled, but where it is ignored, and in another thread, which cannot handle it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return contextlib.nullcontext()
    return handled(handler, signal.SIGINT)
