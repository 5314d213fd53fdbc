"""Refuses requests with a field where the plug-in would not see them and vLLM would ignore it.

It is added to the app only if a hook of `hooks.REQUEST_HOOKS` is missing, so it costs nothing on a
vLLM that the plug-in fits.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dftserve_vllm import body_limit, engine, metrics
from dftserve_vllm.extra_args import DIVERSITY, STYLE

ESCAPED = rb"\u00"
"""Start of a JSON escape, which may stand for a character of a field's name."""

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


class FieldGuard:
    """Pure ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body, messages = await _read(receive)
        for name in (DIVERSITY, STYLE):
            if _has_field(body, name):
                metrics.metrics().count_refusal()
                await _refuse(send, f"{name}: {engine.refusal()}.", name)
                return
        await self._app(scope, _replayed(messages, receive), send)


async def _read(receive: Any) -> tuple[bytes, list[Message]]:
    """The body, read up to the size limit, and the messages that it came in.

    A larger body is let through: `BodyLimit`, further inside, refuses it if it names a field.
    """
    messages: list[Message] = []
    size = 0
    while size <= body_limit.largest():
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        if not messages[-1].get("more_body", False):
            break
    return b"".join(message.get("body", b"") for message in messages), messages


def _has_field(body: bytes, name: str) -> bool:
    """Whether a JSON body has the field with a value other than 0; vLLM answers a body that is not
    JSON."""
    text = body_limit.in_ascii(body)
    if name.encode() not in text and ESCAPED not in text:
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    arguments = content.get("vllm_xargs")
    inner = arguments.get(name) if isinstance(arguments, dict) else None
    return any(value not in (None, 0, "0") for value in (content.get(name), inner))


def _replayed(messages: list[Message], receive: Any) -> Any:
    waiting = iter(messages)

    async def replay() -> Message:
        return next(waiting, None) or await receive()

    return replay


async def _refuse(send: Any, message: str, name: str) -> None:
    """Answers with a 400 in vLLM's format."""
    error = {"message": message, "type": "BadRequestError", "param": name, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
