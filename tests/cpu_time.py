"""The CPU time of a call, for tests that tell linear from quadratic algorithms."""

import gc
import time
from collections.abc import Callable

TRIES = 3


def least_seconds(call: Callable[[], object]) -> float:
    """The least CPU seconds that one of TRIES calls takes.

    Load on the machine does not count. The least, because a try may also pay for cold caches; and
    without the garbage collector, which visits every object that other tests have left: in a whole
    run of the tests one collection takes a second.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return min(_seconds(call) for _ in range(TRIES))
    finally:
        if collects:
            gc.enable()


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
