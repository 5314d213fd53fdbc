"""The answer: a header, and an object in the body or in the stream's last chunk, for each requested
field.

Pure ASGI around vLLM's own app. It reads no request body, and changes only the answers to requests
with a field. An answer that is already compressed gets only the header.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dftserve_vllm import audit, request_context

HEADER = b"x-dftserve-"
"""Followed by the name of the field."""
RENDER = "/render"
"""Suffix of vLLM's routes that return what they would send to the engine."""
UNHANDLED = 500
"""The outer server's status for an exception without a handler, if nothing was sent yet."""
# Only events with one of these can be the one to which our objects are added; others are not
# parsed.
_SIGNS = (b'"finish_reason":"', b'"usage":{', b'"stop_reason":"')

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Send], Awaitable[None]]


class ResponseMiddleware:
    """Opens a context for each HTTP request and writes its contents into the answer."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        context = request_context.RequestContext(
            scope.get("headers", ()), is_render=scope["path"].endswith(RENDER)
        )
        token = request_context.current.set(context)
        try:
            await self._app(scope, receive, _Response(context, send))
        except Exception:
            context.status = context.status or UNHANDLED
            raise
        finally:
            audit.write_notes(context)
            request_context.current.reset(token)


class _Response:
    """`send` for one request: passes messages on until a successful answer with prompts starts."""

    def __init__(self, context: request_context.RequestContext, send: Send) -> None:
        self._context = context
        self._send = send
        self._start: Message = {}
        self._body: list[bytes] = []
        self._finished = 0
        # A function, not a bound method: the reference cycle would keep this object, and all of its
        # request, in memory until a garbage collection.
        self._handle = _Response._pass_on

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._context.status = message["status"]
            audit.write_notes(self._context)
        if message["type"] == "http.response.start" and self._context.prompts:
            await self._begin(message)
        elif message["type"] == "http.response.body":
            await self._handle(self, message)
        else:
            await self._send(message)

    async def _pass_on(self, message: Message) -> None:
        await self._send(message)

    async def _begin(self, message: Message) -> None:
        received = dict(message["headers"])
        content_type = received.get(b"content-type", b"")
        if message["status"] >= 400:
            await self._send(message)
            return
        effective = self._context.prompts[0].effective(with_texts=False)
        added = [
            (HEADER + name.encode(), json.dumps(value, separators=(",", ":")).encode())
            for name, value in effective.items()
        ]
        headers = [*message["headers"], *added]
        self._start = {**message, "headers": headers}
        if received.get(b"content-encoding", b"identity") != b"identity":
            # Compressed by an inner middleware: the bytes are neither JSON nor events.
            await self._send(self._start)
        elif content_type.startswith(b"text/event-stream"):
            self._handle = _Response._stream
            await self._send(self._start)
        elif content_type.startswith(b"application/json"):
            self._handle = _Response._collect
        else:
            await self._send(self._start)

    async def _collect(self, message: Message) -> None:
        """Collect vLLM's JSON body, add the objects to it, and correct its length."""
        self._body.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = _with_members(b"".join(self._body), self._context.members())
        headers = [
            (name, str(len(body)).encode() if name == b"content-length" else value)
            for name, value in self._start["headers"]
        ]
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})

    async def _stream(self, message: Message) -> None:
        """Search the events until our objects are sent; later ones are passed on unchanged."""
        chunk = message.get("body", b"")
        if any(sign in chunk for sign in _SIGNS):
            events = [self._marked(event) for event in chunk.split(b"\n\n")]
            message = {**message, "body": b"\n\n".join(events)}
        await self._send(message)

    def _marked(self, event: bytes) -> bytes:
        """The event, with the fields' objects added if it is the one that carries them."""
        prefix, label, data = event.partition(b"data: ")
        if self._handle is _Response._pass_on or not label or not data.startswith(b"{"):
            return event
        content = json.loads(data)
        if isinstance(response := content.get("response"), dict) and response.get("usage"):
            content["response"] = response | self._context.members()
            data = json.dumps(content, separators=(",", ":")).encode()
        elif self._is_last(content):
            data = _with_members(data, self._context.members())
        else:
            return event
        self._handle = _Response._pass_on
        return prefix + label + data

    def _is_last(self, content: dict[str, Any]) -> bool:
        if "choices" not in content:  # /v1/messages: the event with usage and a stop reason
            return content.get("type") == "message_delta" and bool(content.get("usage"))
        self._finished += sum(bool(choice.get("finish_reason")) for choice in content["choices"])
        if self._context.wants_usage:
            return bool(content.get("usage")) and not content["choices"]
        return self._finished == self._context.choices()


def _with_members(body: bytes, members: dict[str, Any]) -> bytes:
    """The JSON object `body` with members appended, its other bytes unchanged."""
    head = body.rstrip()
    if not head.startswith(b"{") or not head.endswith(b"}"):
        return body
    comma = b"" if head[1:-1].strip() == b"" else b","
    added = json.dumps(members, separators=(",", ":"))[1:-1].encode()
    return head[:-1] + comma + added + b"}"
