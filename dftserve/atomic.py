"""Files and folders that appear whole or not at all, also through a kill or a full disk.

Write beside the place, sync, rename, sync the folder that holds it. Standard library only.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""The suffix of what is being written; a leftover of a kill, which the next write replaces."""


def write_text(path: Path, text: str) -> None:
    """UTF-8, with the text's own line ends."""
    write_file(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under another name, then put it in its place.

    Raises:
        OSError: as `write` or the disk raised it; `path` is then as it was.
    """
    temporary = path.with_name(path.name + PARTIAL)
    temporary.unlink(missing_ok=True)  # It may be a link, and is written through.
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
    """Fill the yielded folder; at the end it stands at `path`, which must not exist before.

    Raises:
        FileExistsError: `path` exists.
        OSError: as the disk raised it; nothing stands at `path` then.
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


def move_folder(made: Path, path: Path) -> None:
    """Sync a folder that is filled and put it at `path`, where nothing is, on the same disk."""
    mask = _umask()
    for each in sorted(made.rglob("*"), reverse=True):
        if each.is_file():
            # safetensors makes its files readable by their owner alone.
            each.chmod(0o666 & ~mask)
        _sync(each)
    _sync(made)
    os.rename(made, path)
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
