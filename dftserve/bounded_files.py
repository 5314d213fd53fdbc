"""Open files whose name or content somebody else chose: regular, in their folder, bounded.

    content = read_json(folder / "dft.json", within=folder, largest=1 << 20)

A file is refused before it is opened when it is no regular file, and before it is read when it is
larger than `largest`. FIFOs and devices are never opened: some act when they are.

`within` names the folder that a file belongs to: a checkpoint, a target store, a corpus. Links are
followed, and what they lead to must lie

- below that folder, or
- in the `blobs` of the Hugging Face cache entry that the folder belongs to: the hub keeps a
  snapshot as `models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`, and nothing else of
  the cache can be reached that way.

Without `within` the name is the user's own, from the command line: its links may lead anywhere.

Not defended: a folder that is changed while it is read. Kind and size are checked again on the open
descriptor, so they hold; where it lies was checked by name. Hard links cannot be told from files.

Standard library only.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

DEEPEST = 64
"""Levels of lists and objects in a JSON or YAML document."""
LARGEST_NAME = 255
"""Bytes of a file's name, as file systems have it."""
INTEGERS = range(-(1 << 63), 1 << 63)
"""What a whole number of a file may be, where nothing narrower is said."""
CHUNK = 1 << 20
CORRECT = "correct the file, or name another"
_HUB_ENTRY = re.compile(r"(models|datasets|spaces)--.+")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}
# Windows has neither, and no files that they are for.
_GUARDED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class FileError(ValueError):
    """A file that is refused: what it is and what is accepted, then what to do about it."""

    def __init__(self, problem: str, advice: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; {advice}.")


def advised(error: ValueError, advice: str) -> str:
    """What an error says, with another advice: in the words of the command that read the file."""
    problem = error.problem if isinstance(error, FileError) else str(error).removesuffix(".")
    return f"{problem}; {advice}."


# ── Opening ──────────────────────────────────────────────────────────────────────────────────────


def real_file(path: str | Path, *, largest: int, within: Path | None = None) -> Path:
    """The real path of a file that may be opened, for libraries that open files by name.

    Raises:
        FileNotFoundError: nothing has that name.
        ValueError: no regular file, outside of `within`, or more than `largest` bytes.
        OSError: as the system raised it, such as PermissionError.
    """
    real = _resolved(Path(path), within)
    check(Path(path), os.stat(real), largest)
    return real


def open_file(path: str | Path, *, largest: int, within: Path | None = None) -> BinaryIO:
    """A file opened for reading; raises as `real_file`."""
    real = real_file(path, largest=largest, within=within)
    return _opened(Path(path), real, os.O_RDONLY, largest, "rb")


def open_growing(path: Path, *, largest: int, create: bool = True, buffering: int = -1) -> BinaryIO:
    """A file that only grows, for reading and appending. No link is followed: it is written to.

    Args:
        buffering: as `open` takes it.

    Raises:
        FileNotFoundError: it is not there, and `create` is false.
        ValueError: a link, no regular file, or more than `largest` bytes.
        OSError: as the system raised it.
    """
    if os.path.lexists(path):
        check(path, os.lstat(path), largest)
    elif not create:
        raise FileNotFoundError(f"{path}: there is no such file.")
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    return _opened(path, path, flags, largest, "a+b", buffering)


def _opened(
    path: Path, real: Path, flags: int, largest: int, mode: str, buffering: int = -1
) -> Any:
    descriptor = os.open(real, flags | _GUARDED, 0o666)
    try:
        check(path, os.fstat(descriptor), largest)
        return os.fdopen(descriptor, mode, buffering)
    except BaseException:
        os.close(descriptor)
        raise


def _resolved(path: Path, within: Path | None) -> Path:
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        if path.is_symlink():
            _refuse(path, f"a link to {os.readlink(path)!r}, where nothing is", "remove it")
        raise FileNotFoundError(f"{path}: there is no such file.") from None
    except OSError as error:
        if path.is_symlink():
            _refuse(path, f"a link that leads nowhere ({error.strerror})", "remove it")
        raise
    if within is not None and not _lies_in(real, Path(os.path.realpath(within))):
        _refuse(path, f"a link to {str(real)!r}, outside of {within}", "put a copy of it there")
    return real


def _lies_in(real: Path, folder: Path) -> bool:
    return real.is_relative_to(folder) or real.parent == _blobs_of(folder)


def _blobs_of(folder: Path) -> Path | None:
    """Where the links of a Hugging Face snapshot lead; None for any other folder."""
    for revision in (folder, *folder.parents):
        entry = revision.parent.parent
        if revision.parent.name == "snapshots" and _HUB_ENTRY.fullmatch(entry.name):
            return entry / "blobs"
    return None


def check(path: Path, found: os.stat_result, largest: int) -> None:
    """Raise ValueError unless `found`, the status of `path`, is of a regular file of that size."""
    if not stat.S_ISREG(found.st_mode):
        _refuse(path, kind(found.st_mode), "name another, or remove it")
    if found.st_size > largest:
        _too_large(path, f"{found.st_size:,} bytes", largest)


def _too_large(path: Path, got: str, largest: int) -> NoReturn:
    raise FileError(f"{path}: got {got}; accepted: at most {largest:,} bytes", "name another file")


def _refuse(path: Path, got: str, what_to_do: str) -> NoReturn:
    raise FileError(f"{path}: got {got}; accepted: a regular file", what_to_do)


def kind(mode: int) -> str:
    """What a file's mode says that it is: "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


def read_bytes(path: str | Path, *, largest: int, within: Path | None = None) -> bytes:
    """All of a file; raises as `real_file`, also where it grew beyond `largest` meanwhile."""
    with open_file(path, largest=largest, within=within) as file:
        return b"".join(chunks(file, path, largest=largest))


def chunks(file: BinaryIO, path: str | Path, *, largest: int) -> Iterator[bytes]:
    """What is left of an open file, a mebibyte at a time, up to `largest` bytes.

    Raises:
        ValueError: there is more. The size of what is packed, or in /proc, shows only in reading.
    """
    left = largest
    while chunk := file.read(CHUNK):
        left -= len(chunk)
        if left < 0:
            _too_large(Path(path), f"more than {largest:,} bytes", largest)
        yield chunk


def read_text(
    path: str | Path, *, largest: int, within: Path | None = None, encoding: str = "utf-8"
) -> str:
    """A file of UTF-8 text; line ends as Python's text files have them.

    Raises:
        ValueError: also for what is not UTF-8.
        FileNotFoundError, OSError: as `real_file`.
    """
    content = read_bytes(path, largest=largest, within=within)
    return decoded(content, str(path), encoding).replace("\r\n", "\n").replace("\r", "\n")


def decoded(content: bytes, where: str, encoding: str = "utf-8") -> str:
    """Raises ValueError that names the first byte that is not UTF-8."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileError(
            f"{where}: got the byte 0x{content[error.start]:02x} at {error.start}, which is not "
            "UTF-8; accepted: UTF-8",
            "convert the file first",
        ) from None


def lines(
    path: str | Path, *, largest: int, longest: int, within: Path | None = None
) -> Iterator[bytes]:
    """The lines of a file, one in memory at a time, with their ends.

    Args:
        longest: bytes of one line.

    Raises:
        ValueError: also for a longer line.
        FileNotFoundError, OSError: as `real_file`.
    """
    with open_file(path, largest=largest, within=within) as file:
        yield from lines_of(file, path, largest=largest, longest=longest)


def lines_of(file: BinaryIO, path: str | Path, *, largest: int, longest: int) -> Iterator[bytes]:
    """The same of an open file, whose size may show only in reading."""
    number, left = 0, largest
    while line := file.readline(longest + 1):
        number, left = number + 1, left - len(line)
        if len(line) > longest:
            raise FileError(
                f"{path}, line {number}: got more than {longest:,} bytes; accepted: shorter lines",
                CORRECT,
            )
        if left < 0:
            _too_large(Path(path), f"more than {largest:,} bytes", largest)
        yield line


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


def read_json(
    path: str | Path,
    *,
    largest: int,
    within: Path | None = None,
    deepest: int = DEEPEST,
    finite: bool = True,
) -> Any:
    """What a JSON file says.

    Args:
        deepest: levels of lists and objects.
        finite: refuse NaN, infinities and whole numbers beyond 64 bits. False is for content whose
            numbers are checked one by one, or are not ours to judge.

    Raises:
        ValueError: also for what is not JSON, too deep, or holds such a number.
        FileNotFoundError, OSError: as `real_file`.
    """
    text = read_text(path, largest=largest, within=within)
    return parse_json(text, str(path), deepest=deepest, finite=finite)


def json_rows(lines: Iterable[bytes], path: str | Path) -> Iterator[tuple[str, Any]]:
    """Of a .jsonl file's lines, those with something on them: the file and the line as an error
    names them, and what it says.

    Raises:
        ValueError: as `parse_json`; also for half a surrogate pair, which no server can be sent.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            _check_unicode(row, where)
            yield where, row


def _check_unicode(content: Any, where: str) -> None:
    """JSON's escapes can spell what no UTF-8 can."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"{where}: got half a surrogate pair, {text[error.start]!a}; accepted: Unicode",
            CORRECT,
        ) from None


def parse_json(
    text: str | bytes, where: str, *, deepest: int = DEEPEST, finite: bool = True
) -> Any:
    """What a JSON text says; `where` begins the error. Raises ValueError as `read_json`."""
    if isinstance(text, bytes):
        text = decoded(text, where)
    given = {} if not finite else _BOUNDED_NUMBERS
    try:
        content = json.loads(text, **given)
    except RecursionError:
        _too_deep(where, deepest)
    except _NotFiniteError as error:
        raise FileError(
            f"{where}: got the number {error}; accepted: finite ones of 64 bits", CORRECT
        ) from None
    except ValueError as error:
        # One too long for `int` is told in three lines; its first clause says it.
        told = str(error).partition(":")[0] if "int_max_str" in str(error) else error
        raise FileError(f"{where}: not JSON ({told})", CORRECT) from None
    if deeper_than(content, deepest):
        _too_deep(where, deepest)
    return content


def deeper_than(content: object, deepest: int) -> bool:
    """Whether lists and objects are nested in more than `deepest` levels; without recursion."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(deepest):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return False
    return bool(level)


def _within(outer: Any) -> Iterator[Any]:
    values = outer.values() if isinstance(outer, dict) else outer
    return (value for value in values if isinstance(value, dict | list))


def _too_deep(where: str, deepest: int) -> NoReturn:
    raise FileError(
        f"{where}: got more than {deepest} levels of lists and keys; accepted: at most {deepest}",
        CORRECT,
    )


class _NotFiniteError(ValueError):
    pass


def _constant(name: str) -> NoReturn:
    raise _NotFiniteError(name)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotFiniteError(_cut(text))
    return value


def _int(text: str) -> int:
    if len(text) > 20 or (value := int(text)) not in INTEGERS:
        raise _NotFiniteError(_cut(text))
    return value


_BOUNDED_NUMBERS: Mapping[str, Any] = {
    "parse_constant": _constant,
    "parse_float": _float,
    "parse_int": _int,
}


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}…"


@contextmanager
def shaped_as(where: str | Path, accepted: str) -> Iterator[None]:
    """What is looked for in a document and is not there, or of another type, is a ValueError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else _cut(str(error))
        problem = f"{where}: got another content ({told}); accepted: {accepted}"
        raise FileError(problem, "name another file") from None


# ── Names in files ───────────────────────────────────────────────────────────────────────────────


def inner_path(name: object, where: str) -> str:
    """A path with `/`, as a file of checksums may give it: of a file below the same folder.

    Raises:
        ValueError: no text, absolute, with `.`, `..` or nothing between two `/`, a control
            character, or a part too long for a file system.
    """
    if not isinstance(name, str) or not all(map(_is_plain, name.split("/"))):
        raise FileError(
            f"{where}: got the name {_cut(repr(name))}; accepted: paths of files below its folder",
            CORRECT,
        )
    return name


def is_plain_name(name: str) -> bool:
    """Whether a manifest may name a file beside it so: no path, nothing that is not printable."""
    return "/" not in name and _is_plain(name)


def _is_plain(part: str) -> bool:
    fits = 0 < len(part.encode(errors="replace")) <= LARGEST_NAME
    return fits and part not in (".", "..") and part.isprintable() and "\\" not in part


def entries(folder: Path, *, most: int) -> dict[str, os.stat_result]:
    """Everything below a folder but folders, by relative path; no link is followed.

    Raises:
        ValueError: more than `most`.
        OSError: a folder that cannot be read.
    """
    found: dict[str, os.stat_result] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as inside:
            for entry in inside:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                    continue
                name = Path(entry.path).relative_to(folder).as_posix()
                found[name] = entry.stat(follow_symlinks=False)
                if len(found) > most:
                    problem = f"{folder}: got more than {most:,} files; accepted: {most:,}"
                    raise FileError(problem, "name another folder")
    return dict(sorted(found.items()))
