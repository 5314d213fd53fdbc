"""Folders that refuse new files, for tests that root may run: its permissions always suffice."""

import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dftserve import atomic


def shut(monkeypatch, *, name: str | None = None, number: int = errno.EACCES) -> None:
    """Let `atomic.check_writable` find the folders of this name, or all, closed to new files."""

    def temporary_file(*, dir: Path) -> Any:
        if name in (None, dir.name):
            raise OSError(number, os.strerror(number))
        return tempfile.TemporaryFile(dir=dir)

    monkeypatch.setattr(atomic, "tempfile", SimpleNamespace(TemporaryFile=temporary_file))
