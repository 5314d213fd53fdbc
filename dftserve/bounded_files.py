"""Open untrusted files: only regular files, inside their folder, of bounded size.

    content = read_json(folder / "dft.json", within=folder, largest=1 << 20)

The file type is checked before the file is opened, and its size (`largest`) before it is read.
FIFOs and devices are never opened, because opening alone can have an effect.

`within` names the folder that a file belongs to: a checkpoint, a target store, a corpus. Links are
followed, and their target must be

- below that folder, or
- in the `blobs` of the Hugging Face cache entry that the folder belongs to: the hub stores a
  snapshot as `models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`, and nothing else of
  the cache can be reached that way.

Without `within` the name comes from the user's command line, and its links may lead anywhere.

Not protected against: a folder that is changed while it is read. Type and size are checked again on
the open descriptor and are therefore reliable; the location is checked by name only. Hard links
cannot be distinguished from files.

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
"""Maximal nesting of lists and objects in a JSON or YAML document."""
LARGEST_NAME = 255
"""Maximal bytes of a file name, the usual file-system limit."""
INTEGERS = range(-(1 << 63), 1 << 63)
"""Accepted integers in a file, unless a narrower range is given."""
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
# Windows lacks these flags, and the files that they guard against.
_GUARDED = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


class FileError(ValueError):
    """A refused file. The message says what was found, what is accepted and what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; {advice}.")


def with_advice(error: ValueError, advice: str) -> str:
    """The error's message with its advice replaced by one that fits the command being run."""
    problem = error.problem if isinstance(error, FileError) else str(error).removesuffix(".")
    return f"{problem}; {advice}."


# ── Opening ──────────────────────────────────────────────────────────────────────────────────────


def real_file(path: str | Path, *, largest: int, within: Path | None = None) -> Path:
    """The checked, resolved path of a file, for libraries that open files by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a regular file, outside of `within`, or more than `largest` bytes.
        OSError: from the system, such as PermissionError.
    """
    real = _resolved(Path(path), within)
    check(Path(path), os.stat(real), largest)
    return real


def open_file(path: str | Path, *, largest: int, within: Path | None = None) -> BinaryIO:
    """Open a file for reading; raises as `real_file`."""
    real = real_file(path, largest=largest, within=within)
    return _opened(Path(path), real, os.O_RDONLY, largest, "rb")


def open_growing(path: Path, *, largest: int, buffering: int = -1) -> BinaryIO:
    """Open an append-only file for reading and appending. Links are refused, since it is written.

    Args:
        buffering: as in `open`.

    Raises:
        ValueError: a link, not a regular file, or more than `largest` bytes.
        OSError: from the system.
    """
    if os.path.lexists(path):
        check(path, os.lstat(path), largest)
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
    """The `blobs` folder that a Hugging Face snapshot's links point to; None for other folders."""
    for revision in (folder, *folder.parents):
        entry = revision.parent.parent
        if revision.parent.name == "snapshots" and _HUB_ENTRY.fullmatch(entry.name):
            return entry / "blobs"
    return None


def check(path: Path, found: os.stat_result, largest: int) -> None:
    """Raise ValueError unless `found`, the stat result of `path`, is of a regular file of at most
    `largest` bytes."""
    if not stat.S_ISREG(found.st_mode):
        _refuse(path, kind(found.st_mode), "name another, or remove it")
    if found.st_size > largest:
        _too_large(path, f"{found.st_size:,} bytes", largest)


def _too_large(path: Path, got: str, largest: int) -> NoReturn:
    raise FileError(f"{path}: got {got}; accepted: at most {largest:,} bytes", "name another file")


def _refuse(path: Path, got: str, what_to_do: str) -> NoReturn:
    raise FileError(f"{path}: got {got}; accepted: a regular file", what_to_do)


def kind(mode: int) -> str:
    """The file type of a mode in words, such as "a FIFO"."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


def read_bytes(path: str | Path, *, largest: int, within: Path | None = None) -> bytes:
    """All of a file; raises as `real_file`, also if the file grows beyond `largest` meanwhile."""
    with open_file(path, largest=largest, within=within) as file:
        return b"".join(chunks(file, path, largest=largest))


def chunks(file: BinaryIO, path: str | Path, *, largest: int) -> Iterator[bytes]:
    """The rest of an open file, a mebibyte at a time, up to `largest` bytes.

    Raises:
        ValueError: there is more. The size of compressed files and of files in /proc is known only
            after reading.
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
    r"""The text of a UTF-8 file, with line ends normalised to \n.

    Raises:
        ValueError: also if it is not UTF-8.
        FileNotFoundError, OSError: as `real_file`.
    """
    content = read_bytes(path, largest=largest, within=within)
    return decoded(content, str(path), encoding).replace("\r\n", "\n").replace("\r", "\n")


def decoded(content: bytes, where: str, encoding: str = "utf-8") -> str:
    """Raises ValueError, naming the first byte that is not valid in the encoding."""
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
    """The lines of a file with their line ends, one in memory at a time.

    Args:
        longest: maximal bytes of one line.

    Raises:
        ValueError: also for a longer line.
        FileNotFoundError, OSError: as `real_file`.
    """
    with open_file(path, largest=largest, within=within) as file:
        yield from lines_of(file, path, largest=largest, longest=longest)


def lines_of(file: BinaryIO, path: str | Path, *, largest: int, longest: int) -> Iterator[bytes]:
    """`lines` of an open file, whose size may be known only after reading."""
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
    finite: bool = True,
) -> Any:
    """The content of a JSON file.

    Args:
        finite: refuse NaN, infinities and integers beyond 64 bits. Pass False if the caller checks
            the numbers itself, or if they are another library's business.

    Raises:
        ValueError: also if it is not JSON, is nested deeper than `DEEPEST` levels, or contains such
            a number.
        FileNotFoundError, OSError: as `real_file`.
    """
    text = read_text(path, largest=largest, within=within)
    return parse_json(text, str(path), finite=finite)


def json_rows(lines: Iterable[bytes], path: str | Path) -> Iterator[tuple[str, Any]]:
    """Parse the non-empty lines of a .jsonl file.

    Yields:
        The file and line number for error messages, and the parsed content.

    Raises:
        ValueError: as `parse_json`; also for half a surrogate pair, which cannot be sent to a
            server.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            _check_unicode(row, where)
            yield where, row


def _check_unicode(content: Any, where: str) -> None:
    """JSON escapes can express lone surrogates, which UTF-8 cannot encode."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FileError(
            f"{where}: got half a surrogate pair, {text[error.start]!a}; accepted: Unicode",
            CORRECT,
        ) from None


def parse_json(text: str | bytes, where: str, *, finite: bool = True) -> Any:
    """Parse a JSON text; error messages begin with `where`. Raises ValueError as `read_json`."""
    if isinstance(text, bytes):
        text = decoded(text, where)
    options = {} if not finite else _BOUNDED_NUMBERS
    try:
        content = json.loads(text, **options)
    except RecursionError:
        _too_deep(where)
    except _NotFiniteError as error:
        raise FileError(
            f"{where}: got the number {error}; accepted: finite ones of 64 bits", CORRECT
        ) from None
    except ValueError as error:
        # Python's message for an integer with too many digits is long; its first clause suffices.
        reason = str(error).partition(":")[0] if "int_max_str" in str(error) else error
        raise FileError(f"{where}: not JSON ({reason})", CORRECT) from None
    if _is_too_deep(content):
        _too_deep(where)
    return content


def _is_too_deep(content: object) -> bool:
    """Whether lists and objects are nested more than `DEEPEST` levels deep; not recursive."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return False
    return bool(level)


def _within(outer: Any) -> Iterator[Any]:
    values = outer.values() if isinstance(outer, dict) else outer
    return (value for value in values if isinstance(value, dict | list))


def _too_deep(where: str) -> NoReturn:
    raise FileError(
        f"{where}: got more than {DEEPEST} levels of lists and keys; accepted: at most {DEEPEST}",
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
    """Turn lookup and type errors inside the block into a ValueError about the document."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else _cut(str(error))
        problem = f"{where}: got another content ({reason}); accepted: {accepted}"
        raise FileError(problem, "name another file") from None


# ── Names in files ───────────────────────────────────────────────────────────────────────────────


def inner_path(name: object, where: str) -> str:
    """Check a path with `/` that a file such as checksums.json gives for a file below its folder.

    Raises:
        ValueError: not a string, absolute, with a part that is empty, `.`, `..` or too long for a
            file system, or with a control character.
    """
    if not isinstance(name, str) or not all(map(_is_plain, name.split("/"))):
        raise FileError(
            f"{where}: got the name {_cut(repr(name))}; accepted: paths of files below its folder",
            CORRECT,
        )
    return name


def is_plain_name(name: str) -> bool:
    """Whether a manifest may name a file of its own folder so: not a path, only printable text."""
    return "/" not in name and _is_plain(name)


def _is_plain(part: str) -> bool:
    fits = 0 < len(part.encode(errors="replace")) <= LARGEST_NAME
    return fits and part not in (".", "..") and part.isprintable() and "\\" not in part


def entries(folder: Path, *, most: int) -> dict[str, os.stat_result]:
    """Everything below a folder except folders, by relative path; links are not followed.

    Raises:
        ValueError: more than `most` entries.
        OSError: a folder that cannot be read.
    """
    stats: dict[str, os.stat_result] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as inside:
            for entry in inside:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                    continue
                name = Path(entry.path).relative_to(folder).as_posix()
                stats[name] = entry.stat(follow_symlinks=False)
                if len(stats) > most:
                    problem = f"{folder}: got more than {most:,} files; accepted: {most:,}"
                    raise FileError(problem, "name another folder")
    return dict(sorted(stats.items()))
