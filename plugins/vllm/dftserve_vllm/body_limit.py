"""Refuses large bodies that name our fields, while they stream; nothing is kept of them.

Stock vLLM reads a body of any size, such as one with videos in it, and goes on doing so for bodies
without the fields. What is looked for is a key with a field's name at any level, since the field
may be in `vllm_xargs`: above the bound, a tool's parameter of that name counts as well. Starlette
reads JSON in UTF-16 and UTF-32 too, as `json.loads` does with bytes.
"""

import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any

from fastapi import HTTPException  # The kind that vLLM answers in its own form.
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
    """Bytes of a body that names a field.

    Raises:
        ValueError: the environment variable holds something else.
    """
    text = os.environ.get(VARIABLE) or str(DEFAULT_MIB)
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text) in ACCEPTED_MIB):
        accepted = f"a whole number of MiB from {ACCEPTED_MIB[0]} to {ACCEPTED_MIB[-1]}"
        raise ValueError(f"{VARIABLE}: got {text[:40]!r}; accepted: {accepted}.")
    return int(text) << 20


def in_ascii(body: bytes) -> bytes:
    """JSON, or a piece of it, in which ASCII text is ASCII whatever the encoding: in UTF-16 and
    UTF-32 such a letter is its byte beside zeros, and UTF-8 has no zeros in JSON."""
    return body.translate(None, b"\0") if b"\0" in body else body


class FieldNames:
    """Whether a body names a field, by its pieces."""

    def __init__(self) -> None:
        self._end = b""
        self.seen = False

    def look(self, piece: bytes) -> None:
        if not self.seen:
            text = self._end + in_ascii(piece)
            self.seen = bool(_KEY.search(text))
            self._end = _end(text)


def _end(text: bytes) -> bytes:
    """What may be of a key that goes on in the next piece. Between a name and its colon there may
    be any number of blanks, of which one is kept."""
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
    """A declared length is the body's: the web server sees to it. Only JSON has our fields; its
    type may be written in letters of either case, and is read so by FastAPI."""
    content_type = Headers(scope=scope).get("content-type", "json").lower()
    return "json" in content_type and not 0 <= _declared(scope) <= largest()


def _declared(scope: Message) -> int:
    """Bytes; -1 where the body's length is not declared."""
    length = Headers(scope=scope).get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else -1


class _Bounded:
    """`receive` of one request, which passes on what comes until it is too much."""

    def __init__(self, receive: Receive, declared: int) -> None:
        self._receive = receive
        self._size = 0
        self._declared = declared
        self._names = FieldNames()

    async def __call__(self) -> Message:
        """
        Raises:
            HTTPException: 413, which the app answers in its own form.
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
