"""One process at a time: an exclusive `flock` on an open file.

The lock lasts until the file is closed or the process ends for any reason, so no stale
locks remain. A `flock` belongs to the open file description, which a forked child
inherits and could hold after its parent has ended; the child therefore closes the file.
Windows and some file systems have no `flock`: there nothing is locked, and the user must
run only one writing process at a time.

Standard library only.
"""

import errno
import functools
import logging
import os
import weakref
from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Error numbers that file systems without locks return."""

logger = logging.getLogger(__name__)
_locked: "weakref.WeakSet[IO[bytes]]" = weakref.WeakSet()


def take(file: IO[bytes], *, wait: bool = False) -> bool:
    """Lock an open file; without `wait`, return False if another process holds the lock.

    On a file system without locks, return True without locking and warn once per process.

    Raises:
        OSError: from the system.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_once(error.strerror)
        return True
    _locked.add(file)
    return True


def take_or_refuse(file: IO[bytes], place: object, *, writer: str, output: str) -> None:
    """Lock the open file that guards `place`, and name what holds it otherwise.

    Args:
        writer, output: what writes there, and what it writes, for the message: "run", "file".

    Raises:
        ValueError: another process holds the lock, or it cannot be taken.
    """
    try:
        is_locked = take(file)
    except OSError as error:
        raise ValueError(
            f"{place} cannot be locked ({error}); accepted: another {output}, on a file system "
            "with locks."
        ) from None
    if not is_locked:
        raise ValueError(
            f"{place}: another {writer} writes to it; wait for it, or choose another {output}."
        )


@functools.cache
def _warn_once(why: str) -> None:
    logger.warning(
        "this file system has no locks (%s): nothing keeps a second process from writing to the "
        "same files; start one at a time.",
        why,
    )


def _close_in_child() -> None:
    for file in list(_locked):
        # Close the raw file, so that buffered data is not flushed: the parent will write it.
        getattr(file, "raw", file).close()
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
