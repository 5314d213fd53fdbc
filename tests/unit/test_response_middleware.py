"""The response middleware: encoded bodies, headers, streams, and the context of a request."""

import asyncio
import gzip
import json

import pytest
from dftserve_vllm import request_context
from dftserve_vllm.response_middleware import ResponseMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import StreamingResponse

from dftserve import spec

PLAIN = json.dumps({"choices": [{"text": "word " * 200}]}).encode()
HEADER = b"x-dftserve-diversity"


def app(content_type: bytes, body: list[bytes], *more: tuple[bytes, bytes], asked: object = 0.5):
    """An ASGI app that answers a request with the field in several pieces, as vLLM's routes do."""

    async def answers(scope, receive, send) -> None:
        opened = request_context.current.get()
        assert opened is not None
        opened.prompts.append(request_context.PromptContext(spec.parse(asked), 1))
        length = (b"content-length", str(sum(map(len, body))).encode())
        headers = [(b"content-type", content_type), length, *more]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, piece in enumerate(body, start=1):
            more_body = number < len(body)
            await send({"type": "http.response.body", "body": piece, "more_body": more_body})

    return answers


def messages_of(middleware, accepts: bytes = b"gzip") -> list[dict]:
    """All messages that the app sends for one POST."""
    messages: list[dict] = []

    async def send(message) -> None:
        messages.append(dict(message))

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"accept-encoding", accepts)]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(middleware(scope, receive, send))
    return messages


def bodies(messages: list[dict]) -> list[bytes]:
    return [message["body"] for message in messages if message["type"] == "http.response.body"]


@pytest.mark.parametrize("content_type", [b"application/json", b"text/event-stream"])
@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"gzip, identity"])
def test_an_encoded_body_is_unchanged_and_has_the_header(content_type, encoding):
    # These bytes would be parsed as JSON and as an event if they were read.
    pieces = [b"{", b'data: {"choices":[{"finish_reason":"stop"}]}\n\n', b"}"]
    encoded = app(content_type, pieces, (b"content-encoding", encoding))
    messages = messages_of(ResponseMiddleware(encoded))
    assert bodies(messages) == pieces
    headers = dict(messages[0]["headers"])
    assert headers[b"content-length"] == str(sum(map(len, pieces))).encode()
    assert json.loads(headers[HEADER])["level"] == 0.5


@pytest.mark.parametrize("more", [(), ((b"content-encoding", b"identity"),)])
def test_an_unencoded_body_gets_the_object(more):
    messages = messages_of(ResponseMiddleware(app(b"application/json", [PLAIN], *more)))
    body = b"".join(bodies(messages))
    assert json.loads(body)["diversity"]["level"] == 0.5
    assert dict(messages[0]["headers"])[b"content-length"] == str(len(body)).encode()


def test_the_header_is_small_and_the_body_has_all_values():
    """Proxies' buffers for headers have a few thousand bytes."""
    breakers = [f"{number:02}" + "\u20ac" * 62 for number in range(32)]
    group = {"id": "\u20ac" * 64, "index": 1, "size": 4}
    asked = {"dry_multiplier": 1, "dry_sequence_breakers": breakers, "group": group}
    answer = app(b"application/json", [PLAIN], asked=asked)
    start, *rest = messages_of(ResponseMiddleware(answer))
    header = dict(start["headers"])[HEADER]
    assert len(header) < 500
    assert json.loads(header)["dry_sequence_breakers"] == 32
    reported = json.loads(b"".join(bodies([start, *rest])))["diversity"]
    assert reported["dry_sequence_breakers"] == breakers
    assert reported["group"] == group


def test_around_gzip_the_body_can_still_be_decompressed():
    messages = messages_of(ResponseMiddleware(GZipMiddleware(app(b"application/json", [PLAIN]))))
    assert gzip.decompress(b"".join(bodies(messages))) == PLAIN
    assert HEADER in dict(messages[0]["headers"])


def test_inside_gzip_the_object_is_in_the_compressed_body():
    messages = messages_of(GZipMiddleware(ResponseMiddleware(app(b"application/json", [PLAIN]))))
    assert json.loads(gzip.decompress(b"".join(bodies(messages))))["diversity"]["level"] == 0.5
    assert HEADER in dict(messages[0]["headers"])


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_responses_carry_the_object_in_their_last_event_however_they_end(end):
    """Up to 0.32 vLLM always reports `completed`; since 0.33 `incomplete` for a cut text."""
    kinds = ("created", "in_progress", end)
    usages = (None, None, {"output_tokens": 16})
    events = [
        {"type": f"response.{kind}", "response": {"status": kind, "usage": usage}}
        for kind, usage in zip(kinds, usages, strict=True)
    ]
    pieces = [
        f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
        for event in events
    ]
    messages = messages_of(ResponseMiddleware(app(b"text/event-stream", pieces)))
    assert bodies(messages)[:-1] == pieces[:-1]
    last = json.loads(bodies(messages)[-1].split(b"data: ")[1])
    assert last["response"].pop("diversity")["level"] == 0.5
    assert last == events[-1]


def test_tasks_and_streams_of_a_request_have_its_context():
    """The policy's decision must be available there, because they send requests to the engine."""
    contexts = []

    async def app(scope, receive, send):
        async def record() -> None:
            contexts.append(request_context.http_request_name())

        async def body():
            await asyncio.create_task(record())
            yield b"{}"

        await record()
        newest = {**scope, "asgi": {"spec_version": "2.4"}}  # Nobody listens for a disconnect.
        await StreamingResponse(body())(newest, receive, send)

    for _ in range(2):
        messages_of(ResponseMiddleware(app))
    assert contexts[0] == contexts[1] != contexts[2] == contexts[3]
    assert None not in contexts
    assert request_context.http_request_name() is None
