"""Answers on disk: an append-only JSON Lines file with one writer at a time.

    with AnswerStore(path, Judgment) as store:
        known = {row.question: row.answer for row in store.rows}
        store.append(Judgment(question, answer))

A line is a row: a frozen dataclass as a JSON object in UTF-8. It is written and synced before
`append` returns, so that a killed process loses only the row being written; the next writer
truncates an incomplete row. A writer holds an exclusive `flock` while it is open, and a second one
is refused. Readers take no lock, change nothing, and ignore an unfinished last line.

Windows has no `flock`: the file is not locked there, and only one process may write to it.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from dftserve import lock, settings
from dftserve.bounded_files import FileError, chunks, open_growing, parse_json, read_bytes

Row = TypeVar("Row")

LARGEST = 4 << 30
"""Maximum bytes of a file of answers, which is read into memory whole."""


class AnswerStore(Generic[Row]):
    """The writer of a file of answers, which it creates if there is none.

    Attributes:
        rows: the rows in the file on entering.

    Raises:
        ValueError: on entering, if the file is a link, not a regular file, larger than `LARGEST`,
            has other contents, is locked by another writer, or cannot be written. Its contents
            are then unchanged.
    """

    rows: tuple[Row, ...]

    def __init__(self, path: Path, row: type[Row]) -> None:
        """
        Args:
            row: a dataclass of JSON types, as `settings.load` accepts it.
        """
        self._path, self._row = path, row
        self._closing = contextlib.ExitStack()
        self._threads = threading.Lock()

    def __enter__(self) -> "AnswerStore[Row]":
        with contextlib.ExitStack() as opened:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered, so that `append` sees how much of a row was written.
                file = open_growing(self._path, largest=LARGEST, buffering=0)
                self._file = opened.enter_context(file)
            except OSError as error:
                raise ValueError(
                    f"answers: got {self._path}, which cannot be written: {error}."
                ) from None
            self._lock()
            self._file.seek(0)
            content = b"".join(chunks(self._file, self._path, largest=LARGEST))
            self.rows = tuple(_rows(content, self._path, self._row))
            self._file.truncate(content.rfind(b"\n") + 1)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def append(self, row: Row) -> None:
        """Add a row; from any thread.

        Raises:
            OSError: the write failed; the file is then unchanged.
        """
        line = _line(row)
        with self._threads:
            end = self._file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except BaseException:
                # An incomplete row would corrupt the next one too.
                self._file.truncate(end)
                raise

    def _lock(self) -> None:
        try:
            is_locked = lock.take(self._file)
        except OSError as error:
            raise ValueError(
                f"answers: got {self._path}, which cannot be locked ({error}); accepted: a file on "
                "a file system with locks."
            ) from None
        if not is_locked:
            raise ValueError(
                f"answers: got {self._path}, to which another run writes; wait for it, or name "
                "another file."
            )


def read(path: Path, row: type[Row]) -> list[Row]:
    """The rows of a file of answers, empty if there is no file. May run while a writer is active.

    Raises:
        ValueError: it has other contents, is not a regular file in its folder, or is larger than
            `LARGEST`.
        OSError: it cannot be read.
    """
    try:
        content = read_bytes(path, within=path.parent, largest=LARGEST)
    except FileNotFoundError:
        return []
    return list(_rows(content, path, row))


def _rows(content: bytes, path: Path, row: type[Row]) -> Iterator[Row]:
    *lines, unfinished = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            yield settings.load(row, parse_json(line, "line"), "line")
        except ValueError as error:
            why = error.problem if isinstance(error, FileError) else f"{error}"
            raise _not_an_answer(path, number, why) from None
    beginning = b'{"%s": ' % fields(row)[0].name.encode()  # type: ignore[arg-type]
    if not (unfinished.startswith(beginning) or beginning.startswith(unfinished)):
        raise _not_an_answer(path, len(lines) + 1, "unexpected beginning")


def _not_an_answer(path: Path, number: int, why: str) -> ValueError:
    return ValueError(
        f"answers: got {path}, whose line {number} is no answer ({why}); accepted: a file that "
        "this command wrote, or one that does not exist."
    )


def _line(row: Any) -> bytes:
    content = asdict(row)
    try:
        text = json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # A lone surrogate, which UTF-8 cannot encode.
        text = json.dumps(content).encode()
    return text + b"\n"
