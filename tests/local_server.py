"""Servers for clients without an engine: a small HTTP server in a thread, a proxy's process."""

import http.server
import json
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dftserve.spec import HUMAN, parse, parse_style
from tests.conftest import PATIENCE


@contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """`answer` writes the response to every request; yields http://127.0.0.1:PORT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # Five, the default, reset the connections of a busy client.

    with _running(Server(("127.0.0.1", 0), Handler)) as url:
        yield url


@contextmanager
def closing() -> Iterator[str]:
    """A server that closes each connection on the first data; yields http://127.0.0.1:PORT."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)

    with _running(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


@contextmanager
def _running(server: socketserver.TCPServer) -> Iterator[str]:
    """Serve in a thread; yields http://127.0.0.1:PORT."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def listening(command: Sequence[str | Path], port: int, log: Path) -> Iterator[str]:
    """A process that serves on a loopback port, once it accepts connections; yields
    http://127.0.0.1:PORT. Its output is written to `log`."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        until = time.monotonic() + PATIENCE
        while not _accepts_connections(port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not run:\n{log.read_text()}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _accepts_connections(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def reply(
    request: http.server.BaseHTTPRequestHandler, status: int, body: bytes, **headers: str
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def in_force(body: dict, *statistics: dict | None, cap: float = 1.0) -> dict[str, dict]:
    """The `diversity` and `style` objects of an answer, as the plug-in writes them.

    Args:
        cap: the maximum of levels and strengths under a policy that lowers larger values.
    """
    found: dict[str, dict] = {}
    if "diversity" in body:
        is_human = body["diversity"] == HUMAN
        found["diversity"] = {"law": "budget"} if is_human else parse(body["diversity"]).as_dict()
    if "style" in body:
        found["style"] = dict(parse_style(body["style"]).as_dict())
    for each in found.values():
        above = {n: each[n] for n in ("level", "strength") if each.get(n, 0) > cap}
        if above:
            each |= {**dict.fromkeys(above, cap), "clamped": above}
        each["choices"] = list(statistics)
    return found


@contextmanager
def model_server(
    say: Callable[[dict], str], *, active: bool = True, cap: float = 1.0
) -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible server that answers a body with `say(body)`; yields its URL and the
    bodies. `cap` is as for `in_force`."""
    bodies: list[dict] = []

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        size = int(request.headers.get("Content-Length", 0))
        body = json.loads(request.rfile.read(size)) if size else {}
        if request.path == "/v1/models":
            content: dict = {"data": [{"id": "m"}]}
        elif request.path == "/v1/dft/capabilities":
            content = {"active": active}
        else:
            bodies.append(body)
            text = say(body)
            choice = {"text": text, "message": {"role": "assistant", "content": text}}
            content = {"choices": [{"index": n, **choice} for n in range(body.get("n", 1))]}
            content |= in_force(body, cap=cap)
        headers = {"Content-Type": "application/json"}
        reply(request, 200, json.dumps(content).encode(), **headers)

    with serving(answer) as url:
        yield url, bodies
