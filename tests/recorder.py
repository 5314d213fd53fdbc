"""A proxy between a client and the engine that records requests and answers."""

import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.conftest import PATIENCE
from tests.local_server import serving

HEADER = "x-dftserve-diversity"
_OF_THE_CONNECTION = {"host", "connection", "content-length", "transfer-encoding"}
_OURS_TO_GIVE = _OF_THE_CONNECTION | {"date", "server"}


@dataclass(frozen=True)
class Exchange:
    """One request that reached the engine, and its answer."""

    path: str
    body: dict[str, Any]
    status: int
    header: str | None
    has_object: bool
    """Whether its body contains statistics; not detected in a compressed body."""
    encoding: str | None


@dataclass
class Recorder:
    """Forwards everything, and records the POST requests by case.

    A client's base URL is `{url}/{case}/v1`.
    """

    engine: str
    encodings: str = "identity"
    """The Accept-Encoding sent to the engine, instead of the client's."""
    url: str = ""
    exchanges: dict[str, list[Exchange]] = field(default_factory=dict)

    def pass_on(self, request: http.server.BaseHTTPRequestHandler) -> None:
        _, case, path = request.path.split("/", 2)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        kept = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _OF_THE_CONNECTION | {"accept-encoding"}
        }
        with (
            httpx.Client(trust_env=False, timeout=PATIENCE) as client,
            client.stream(
                request.command,
                f"{self.engine}/{path}",
                content=body,
                headers=kept | {"Accept-Encoding": self.encodings},
            ) as answer,
        ):
            content = _relay(answer, request)
        if request.command == "POST":
            seen = Exchange(
                f"/{path}",
                json.loads(body),
                answer.status_code,
                answer.headers.get(HEADER),
                b'"mean_entropy_after"' in content,
                answer.headers.get("Content-Encoding"),
            )
            self.exchanges.setdefault(case, []).append(seen)


def _relay(answer: httpx.Response, request: http.server.BaseHTTPRequestHandler) -> bytes:
    """Forward the answer piece by piece as it arrives; returns all of it."""
    request.send_response(answer.status_code)
    for name, value in answer.headers.items():
        if name.lower() not in _OURS_TO_GIVE:
            request.send_header(name, value)
    request.end_headers()
    pieces = []
    for piece in answer.iter_raw():
        pieces.append(piece)
        request.wfile.write(piece)
        request.wfile.flush()
    return b"".join(pieces)


@contextmanager
def recording(engine: str, encodings: str = "identity") -> Iterator[Recorder]:
    recorder = Recorder(engine, encodings)
    with serving(recorder.pass_on) as url:
        recorder.url = url
        yield recorder
