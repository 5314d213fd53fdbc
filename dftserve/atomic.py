"""Atomic writes: files and folders appear complete or not at all, even after a kill or a full disk.

Write under a temporary name in the same folder, sync, rename, sync the parent folder. Standard
library only.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a file or folder while it is being written. One left over from a killed process is
replaced by the next write."""


def has_only(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder has no entries but these, such as what a killed process left; True if it
    does not exist, False if it is a file."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name in names for path in folder.iterdir())


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before the work whose result it is for.
    Leaves nothing. A disk may refuse it later for other reasons, such as a lack of space.

    Raises:
        OSError: the folder, or the nearest of its parents that exists, is not a folder, or this
            process may not write to it.
    """
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be made: Not a directory: {nearest}; choose another folder."
        )
    try:
        # By trying: permissions alone do not tell, for root or on a read-only file system.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written: {error.strerror}: {nearest}; choose another folder."
        ) from None


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists; a broken link exists."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; line endings are not translated."""
    write_file(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create the file under a temporary name, then rename it to `path`.

    Raises:
        OSError: from `write` or the disk; `path` is then unchanged.
    """
    temporary = path.with_name(path.name + PARTIAL)
    temporary.unlink(missing_ok=True)  # If it is a link, `write` would follow it.
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is renamed to `path`, which must not exist.

    Raises:
        FileExistsError: `path` exists.
        OSError: from the disk; `path` is then not created.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another place, or remove it.")
    temporary = path.with_name(path.name + PARTIAL)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        move_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def move_folder(source: Path, path: Path) -> None:
    """Sync a filled folder and rename it to `path`: on the same disk, and not existing yet."""
    mask = _umask()
    for each in sorted(source.rglob("*"), reverse=True):
        if each.is_file():
            # safetensors makes its files readable by their owner only.
            each.chmod(0o666 & ~mask)
        _sync(each)
    _sync(source)
    os.rename(source, path)
    _sync(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
