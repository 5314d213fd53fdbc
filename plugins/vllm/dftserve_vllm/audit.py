"""The audit log: one JSON line for each request with a field. It contains no text from the client
except the request id and the model name.

    {"time": "2026-11-28T06:50:00.123+00:00", "request_id": "3f…", "model": "demo",
     "key": "FIRST_12_DIGITS", "asked": {"diversity": {…}}, "effective": {"diversity": {…}},
     "outcome": "clamped", "prompts": 1, "status": 200}

Enabled by `audit` in the policy. A line that cannot be written is counted (`dft:audit_lost_total`),
and the first failure is logged; the request continues.
"""

import fcntl
import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers

from dftserve import bounded_files, spec
from dftserve.policy import MIB, Audit
from dftserve_vllm import engine, metrics, policy, request_context
from dftserve_vllm.extra_args import DIVERSITY, STYLE, parse_field, parse_style_field
from dftserve_vllm.log import logged_once
from dftserve_vllm.request_context import PromptContext, RequestContext

KEY_DIGITS = 12
"""Digits of the key's SHA-256 that are logged: enough to distinguish keys."""
LONGEST_NAME = 128
"""Maximum characters of a request id and of a model name; both come from clients."""


class AuditLog:
    """A file of lines that is rotated by size; several processes may write to it."""

    def __init__(self, settings: Audit) -> None:
        self._path = Path(settings.file)
        self._largest = settings.largest_mib * MIB
        self._keep = settings.keep
        self._descriptor: int | None = None

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line to the log, by a single write.

        Raises:
            OSError, ValueError: the line was not written; the next call opens the file again.
        """
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            descriptor = self._current()
            if _ends_cut(descriptor):
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{self._path}: a line was cut: is the disk full?")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _current(self) -> int:
        """Descriptor of the file at the path, even if another process has rotated it."""
        if self._descriptor is not None and not self._is_at_path(self._descriptor):
            self.close()
        if self._descriptor is None:
            self._descriptor = self._open()
        if os.fstat(self._descriptor).st_size >= self._largest and self._rotated(self._descriptor):
            self.close()
            self._descriptor = self._open()
        return self._descriptor

    def _open(self) -> int:
        """Opens a file of any size: `_current` rotates one that is too large."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        # Never write through a symbolic link, and never block on a pipe.
        descriptor = os.open(self._path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            bounded_files.check(self._path, os.fstat(descriptor), largest=sys.maxsize)
        except ValueError:
            os.close(descriptor)
            raise
        return descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def _rotated(self, descriptor: int) -> bool:
        """Rename FILE.3 to FILE.4 …, FILE to FILE.1, if this process gets the lock.

        Returns:
            Whether the descriptor's file has been renamed. This runs in the server's event loop, so
            it does not wait for a process that holds the lock: the line is appended to the file
            under its current name, and the next call tries again.
        """
        try:
            # Released when the file is closed.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not self._is_at_path(descriptor):
            return True
        for number in range(self._keep - 1, 0, -1):
            if (older := self._numbered(number)).exists():
                os.replace(older, self._numbered(number + 1))
        os.replace(self._path, self._numbered(1))
        self._delete_beyond(self._keep)
        return True

    def _delete_beyond(self, keep: int) -> None:
        """Delete files left from a run with a larger `keep`. Stops at the first gap, so that files
        numbered by something else are not deleted."""
        for number in itertools.count(keep + 1):
            try:
                os.remove(self._numbered(number))
            except FileNotFoundError:
                return

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _ends_cut(descriptor: int) -> bool:
    """Whether the last line lacks its line end: the disk was full while it was written, perhaps by
    another process or before a restart."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


@lru_cache
def log() -> AuditLog | None:
    """This process's audit log; None if the policy configures none."""
    in_force = policy.policy()
    return AuditLog(in_force.audit) if in_force is not None and in_force.audit is not None else None


def note(request: Any, prompt: PromptContext) -> None:
    """Record an accepted prompt with the settings in force for it. vLLM processes a body's prompts
    one by one: equal entries are merged and counted, and written when the answer begins."""
    if log() is None or not request_context.generates():
        return
    current = request_context.current.get()
    rest = {
        "effective": prompt.effective(with_texts=False),
        "outcome": "clamped" if prompt.clamped else "accepted",
        "prompts": 1,
    }
    with _counted():
        entry = {**_of_request(request), **rest}
        if current is None:
            _write(entry)
        elif current.notes and _is_same(current.notes[-1], entry):
            current.notes[-1]["prompts"] += 1
        else:
            current.notes.append(entry)


def write_notes(context: RequestContext) -> None:
    """Write the entries of an HTTP request together with its outcome, which is not known when they
    are recorded: parameters are created before vLLM admits the request and its engine runs it."""
    notes, context.notes = context.notes, []
    status = context.status
    outcome = {} if _is_success(status) else {"outcome": "failed"}
    for entry in notes:
        with _counted():
            _write({**entry, **outcome, "status": status})


def _is_success(status: int | None) -> bool:
    """Whether an HTTP status is of a successful answer; None means that there was none."""
    return status is not None and status < 400


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two entries differ only in their time and number of prompts."""
    return all(one[name] == other[name] for name in one if name not in ("time", "prompts"))


@contextmanager
def refusals(request: Any) -> Iterator[None]:
    """Logs a request whose field is refused in the body with a 400."""
    try:
        yield
    except Exception as error:
        parameter = getattr(error, "parameter", None)
        is_noted = log() is not None and request_context.generates()
        if is_noted and isinstance(parameter, str) and _requested_fields(request) is not None:
            name = parameter.removeprefix("vllm_xargs.").partition(".")[0]
            with _counted():
                refused = {"effective": None, "outcome": "refused", "param": name}
                _write({**_of_request(request), **refused})
        raise


@contextmanager
def _counted() -> Iterator[None]:
    """Counts a line that cannot be written; the request continues."""
    with logged_once("the audit log has gaps; dft:audit_lost_total counts them"):
        try:
            yield
        except BaseException:
            metrics.metrics().count_lost_audit()
            raise


def _write(entry: dict[str, Any]) -> None:
    audit_log = log()
    assert audit_log is not None
    audit_log.write(entry)


def _of_request(request: Any) -> dict[str, Any]:
    digest = policy.key_digest()
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": _cut(_request_id(request)),
        "model": _cut(getattr(request, "model", None) or engine.served_model_name()),
        "key": None if digest is None else digest[:KEY_DIGITS],
        "asked": _requested_fields(request),
    }


def _request_id(request: Any) -> object:
    """The request id by vLLM's own rule: from the header, else from the body."""
    current = request_context.current.get()
    headers = Headers(raw=list(current.headers)) if current is not None else {}
    return headers.get("x-request-id") or getattr(request, "request_id", None)


def _cut(text: object) -> str | None:
    return None if text is None else str(text)[:LONGEST_NAME]


def _requested_fields(request: Any) -> dict[str, Any] | None:
    """The request's fields in their parsed form; None if it has none."""
    fields: dict[str, Any] = {}
    for name, shown in ((DIVERSITY, _diversity), (STYLE, _style)):
        top = (getattr(request, "model_extra", None) or {}).get(name)
        argument = (getattr(request, "vllm_xargs", None) or {}).get(name)
        if (value := argument if top is None else top) is not None:
            fields[name] = shown(value)
    return fields or None


def _diversity(value: object) -> object:
    if value == spec.HUMAN:
        return spec.HUMAN
    try:
        return parse_field(value).without_texts()
    except spec.DiversityError:
        return "not acceptable"


def _style(value: object) -> object:
    """A name that the server does not know is logged as `unknown`: it could be any text."""
    try:
        style = parse_style_field(value)
    except spec.DiversityError:
        return "not acceptable"
    current = request_context.current.get()
    known = [profile.name for profile in engine.styles().profiles]
    known += [each.style for each in current.adapters] if current is not None else []
    return style.as_dict() if style.name in known else "unknown"
