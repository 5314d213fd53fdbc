"""Handlers of SIGINT and SIGTERM, and how a build reacts to them: it unwinds once, and ends its
processes."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
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
    with handled_by(lambda number, _: received.append(number)):
        yield
    if received:
        signal.raise_signal(received[0])


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM call the handler. Python allows this in the main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _restore(before, handler)


def _restore(former: Mapping[signal.Signals, Any], handler: Callable[..., object]) -> None:
    """Restore every handler, even if a signal arrives in between and one that is already restored
    raises: otherwise the process would ignore the other signal from then on."""
    try:
        for number, each in former.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, each)
    except BaseException:
        _restore(former, handler)
        raise
