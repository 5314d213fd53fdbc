"""How a build reacts to SIGINT and SIGTERM: it unwinds once, and ends its processes."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


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

    def defer(number: int, frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _restore(before, defer)
    if received:
        signal.raise_signal(received[0])


def _restore(handlers: Mapping[signal.Signals, Any], replaced: Callable[..., None]) -> None:
    """Restore every handler, even if a signal arrives in between and one that is already restored
    raises: otherwise the process would ignore the other signal from then on."""
    try:
        for number, handler in handlers.items():
            if signal.getsignal(number) is replaced:
                signal.signal(number, handler)
    except BaseException:
        _restore(handlers, replaced)
        raise
