"""The cost of a call, for tests that tell linear from quadratic algorithms."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRIES = 3


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection visits every object that other tests have left, which takes a second in a whole
    run of the tests, and calls the callbacks of other packages, such as hypothesis's."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def least_seconds(call: Callable[[], object]) -> float:
    """The least CPU seconds that one of TRIES calls takes: load on the machine does not count, and
    cold caches count in one of them only."""
    with without_garbage_collection():
        return min(_seconds(call) for _ in range(TRIES))


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
