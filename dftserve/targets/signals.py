"""How a build reacts to SIGINT and SIGTERM: it unwinds once, and ends its processes."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM raises SystemExit, so that the processes of a build are ended and no
    partial file is left. Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, exit_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_once(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # A second signal would interrupt the unwinding.
    sys.exit(128 + number)


@contextmanager
def deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end: a worker whose start they interrupt would get
    half of its arguments and print a traceback. Python allows this in the main thread only, which
    is also the only one that they interrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])
