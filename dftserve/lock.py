"""One process at a time: an exclusive `flock` on an open file.

It lasts until the file is closed or its process ends, however it ends: none is left
over. A `flock` belongs to whoever has the file open, and a forked child would have it
too and keep it beyond its parent: there the file is closed. Windows has no `flock`, and
some file systems have none: nothing is locked there, and only one process may write.

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
"""What file systems without locks answer."""

logger = logging.getLogger(__name__)
_locked: "weakref.WeakSet[IO[bytes]]" = weakref.WeakSet()


def take(file: IO[bytes], *, wait: bool = False) -> bool:
    """Lock an open file; False where another process has it, unless that is waited for.

    Where the file system has no locks it goes on without, and warns once a process.

    Raises:
        OSError: as the system raised it.
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


@functools.cache
def _warn_once(why: str) -> None:
    logger.warning(
        "this file system has no locks (%s): nothing keeps a second process from writing to the "
        "same files; start one at a time.",
        why,
    )


def _close_in_child() -> None:
    for file in list(_locked):
        # Not the buffer above it: what it holds is its parent's to write.
        getattr(file, "raw", file).close()
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
