"""One process at a time: an exclusive `flock` on an open file.

It lasts until the file is closed or its process ends, however it ends: none is left
over. Windows has no `flock`: nothing is locked there, and only one process may write.

Standard library only.
"""

from typing import IO

try:
    import fcntl
except ImportError:
    fcntl = None


def take(file: IO[bytes], *, wait: bool = False) -> bool:
    """Lock an open file; False where another process has it, unless that is waited for.

    Raises:
        OSError: the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
