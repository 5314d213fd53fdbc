"""Refuses large bodies that name our fields, while they stream and without buffering them.

Stock vLLM reads a body of any size, such as one with videos in it, and still does so for bodies
without the fields. The search is for a key with a field's name at any level, since the field may be
in `vllm_xargs`; so, above the limit, a tool's parameter of that name counts as well. Starlette also
reads JSON in UTF-16 and UTF-32, as `json.loads` does with bytes.
"""

import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any

from fastapi import HTTPException  # vLLM has a handler that answers this in its own format.
from starlette.datastructures import Headers

from dftserve_vllm import metrics

VARIABLE = "DFTSERVE_MAX_BODY_MIB"
DEFAULT_MIB = 32
ACCEPTED_MIB = range(1, 4097)
LONGEST_NAME = len(b'"diversity"')

_KEY = re.compile(rb'"(?:diversity|style)"\s*:')

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Any, Any, Any], Awaitable[None]]


@lru_cache
def largest() -> int:
    """The maximum size of a body that names a field, in bytes.

    Raises:
        ValueError: the environment variable has an unacceptable value.
    """
    text = os.environ.get(VARIABLE) or str(DEFAULT_MIB)
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text) in ACCEPTED_MIB):
        accepted = f"a whole number of MiB from {ACCEPTED_MIB[0]} to {ACCEPTED_MIB[-1]}"
        raise ValueError(f"{VARIABLE}: got {text[:40]!r}; accepted: {accepted}.")
    return int(text) << 20


def in_ascii(body: bytes) -> bytes:
    """JSON, or a piece of it, with zero bytes removed, so that ASCII text is found in any encoding:
    UTF-16 and UTF-32 pad an ASCII character with zeros, and JSON in UTF-8 has none."""
    return body.translate(None, b"\0") if b"\0" in body else body


class FieldNames:
    """Detects in the pieces of a body whether it names a field."""

    def __init__(self) -> None:
        self._end = b""
        self.seen = False

    def look(self, piece: bytes) -> None:
        if not self.seen:
            text = self._end + in_ascii(piece)
            self.seen = bool(_KEY.search(text))
            self._end = _end(text)


def _end(text: bytes) -> bytes:
    """The end of a piece, which may be the start of a key that continues in the next one. There may
    be any number of blanks between a name and its colon; one of them is kept."""
    name = text.rstrip()
    return name[-LONGEST_NAME:] + text[len(name) :][:1]


class BodyLimit:
    """Pure ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _may_be_large(scope):
            receive = _Bounded(receive, _declared(scope))
        await self._app(scope, receive, send)


def _may_be_large(scope: Message) -> bool:
    """Whether a body may exceed the limit. A declared length can be trusted: the web server
    enforces it. Only JSON bodies have our fields; FastAPI reads the content type
    case-insensitively."""
    content_type = Headers(scope=scope).get("content-type", "json").lower()
    return "json" in content_type and not 0 <= _declared(scope) <= largest()


def _declared(scope: Message) -> int:
    """The declared length in bytes; -1 if there is none."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1


class _Bounded:
    """One request's `receive`, which passes messages on until the body exceeds the limit."""

    def __init__(self, receive: Receive, declared: int) -> None:
        self._receive = receive
        self._size = 0
        self._declared = declared
        self._names = FieldNames()

    async def __call__(self) -> Message:
        """
        Raises:
            HTTPException: 413, which the app answers in its own format.
        """
        message = await self._receive()
        piece = message.get("body", b"")
        self._size += len(piece)
        self._names.look(piece)
        if self._names.seen and max(self._size, self._declared) > largest():
            metrics.metrics().count_refusal()
            most = largest() >> 20
            raise HTTPException(
                413,
                f"diversity or style in a body of more than {most} MiB; accepted: at most {most} "
                f"MiB, or a body without the field ({VARIABLE} of the server).",
            )
        return message
