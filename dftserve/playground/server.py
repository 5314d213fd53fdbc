"""The playground's own server: the page's files, and two routes to the upstream server.

    with listening(port=8100) as found:
        run(Upstream("http://127.0.0.1:8000/v1", key=None, key_variable="OPENAI_API_KEY"), found)

It has the API key and the page does not. So it listens on the loopback address only, rejects any
other `Host` (DNS rebinding), and accepts only JSON, which a page of another origin cannot send
without a CORS permission, which is never given.
"""

import json
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

HOST = "127.0.0.1"
MAX_BODY_BYTES = 1 << 20
"""Of a request from the page, whose prompt is typed."""
ANSWER_TIMEOUT_S, INFO_TIMEOUT_S = 600.0, 10.0
"""For the next bytes of an answer; for requests about the server itself."""
STATIC = resources.files("dftserve.playground") / "static"
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FORWARDED_HEADERS = ("content-type", "x-dftserve-diversity", "x-dftserve-style")
"""Headers of an answer that are forwarded."""


@dataclass(frozen=True)
class Upstream:
    """The server that answers."""

    url: str
    """Includes /v1."""
    key: str | None
    key_variable: str
    """The environment variable that holds the key; the page's code examples read it."""

    def client(self) -> httpx.AsyncClient:
        # The plug-in adds no statistics to an answer that is already compressed.
        headers = {"Accept-Encoding": "identity"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=INFO_TIMEOUT_S),
            # For a local server, the key must not be sent through a proxy.
            trust_env=not self.is_local,
            # The server may close an idle connection just when it is used again.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    @property
    def is_local(self) -> bool:
        host = httpx.URL(self.url).host
        try:
            return ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on the loopback address.

    Args:
        port: 0: any free port.

    Raises:
        OSError: the port is taken or cannot be used.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            advice = "choose another --port, or 0 for any free port"
            raise OSError(f"port {port} of {HOST}: {error.strerror}; {advice}.") from None
        yield listener


def run(upstream: Upstream, listener: socket.socket) -> None:
    """Serve until a signal ends it."""
    config = uvicorn.Config(
        app(upstream), log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[listener])


def app(upstream: Upstream) -> Starlette:
    """The ASGI application: the page's files, and requests passed on to the server with its key."""

    @asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        application.state.upstream = upstream
        async with upstream.client() as client:
            application.state.client = client
            yield

    routes = [
        Route("/", page_file),
        Route("/static/{name}", page_file),
        Route("/api/server", server_info),
        Route("/api/chat", chat, methods=["POST"]),
    ]
    own_host = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[own_host], lifespan=lifespan)


async def page_file(request: Request) -> Response:
    """One of the page's files, looked up by name, so that no other file can be reached."""
    name = request.path_params.get("name", "page.html")
    files = {each.name: each for each in STATIC.iterdir()}
    if name not in files:
        return Response(status_code=404)
    kind = MEDIA_TYPES[name.rpartition(".")[2]]
    return Response(files[name].read_bytes(), media_type=kind, headers=SECURITY)


# ── The upstream server ──────────────────────────────────────────────────────────────────────────


async def server_info(request: Request) -> Response:
    """The upstream server's models and capabilities, or what is wrong with it."""
    info = await read_info(request.app.state.client, request.app.state.upstream)
    return JSONResponse(info, headers=SECURITY)


async def read_info(client: httpx.AsyncClient, upstream: Upstream) -> dict[str, Any]:
    """What the page shows of the server: its models and capabilities, or the problem in words."""
    url = upstream.url
    info: dict[str, Any] = {"url": url, "key_variable": upstream.key_variable}
    info |= {"models": [], "capabilities": None, "problem": None}
    try:
        models = await client.get("models", timeout=INFO_TIMEOUT_S)
        if models.status_code in (401, 403):
            refused = f"{url} refuses the API key of {upstream.key_variable} (--api-key-env)."
            return info | {"problem": refused}
        models.raise_for_status()
        info["models"] = [str(each["id"]) for each in models.json()["data"]]
        capabilities = await client.get("dft/capabilities", timeout=INFO_TIMEOUT_S)
        if capabilities.status_code == 200 and isinstance(content := capabilities.json(), dict):
            info["capabilities"] = content
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return info | {"problem": unreachable(url, error)}
    return info | {"problem": inactive(info["capabilities"])}


def inactive(capabilities: Mapping[str, Any] | None) -> str | None:
    """Why `diversity` would have no effect on the server; None if it is honoured."""
    if capabilities is None:
        return (
            "This server has no diversity field: install dftserve-vllm in its vLLM's environment, "
            "and restart it."
        )
    return None if capabilities.get("active") else str(capabilities.get("reason"))


def unreachable(url: str, error: Exception) -> str:
    """The message for a server that does not answer, or not as an OpenAI-compatible one."""
    reason = str(error) or type(error).__name__
    return f"{url} does not answer as an OpenAI-compatible server ({reason}): is it running?"


async def chat(request: Request) -> Response:
    """Forward a request of the page unchanged, and stream its answer. If the page disconnects, the
    request to the server is cancelled."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return refusal(415, "Content-Type: accepted: application/json.")
    body = await bounded_body(request)
    if body is None:
        return refusal(413, f"The request is too large; accepted: {MAX_BODY_BYTES >> 20} MiB.")
    client: httpx.AsyncClient = request.app.state.client
    headers = {"Content-Type": "application/json"}
    try:
        asked = client.build_request("POST", "chat/completions", content=body, headers=headers)
        answer = await client.send(asked, stream=True)
    except httpx.HTTPError as error:
        return refusal(502, unreachable(str(client.base_url), error))
    kept = {name: answer.headers[name] for name in FORWARDED_HEADERS if name in answer.headers}
    return StreamingResponse(pieces(answer), answer.status_code, headers={**kept, **SECURITY})


async def pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The server's answer as it arrives; an error after its start becomes an event of the
    stream."""
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    except httpx.HTTPError as error:
        # The status was already sent, so the error is reported in the stream.
        message = f"The server's answer broke off ({str(error) or type(error).__name__})."
        yield f"\n\ndata: {json.dumps({'error': {'message': message}})}\n\n".encode()
    finally:
        await answer.aclose()


async def bounded_body(request: Request) -> bytes | None:
    """None where it is longer than `MAX_BODY_BYTES`."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def refusal(status: int, message: str) -> Response:
    """An error in the form of OpenAI's API."""
    return JSONResponse({"error": {"message": message}}, status, headers=SECURITY)
