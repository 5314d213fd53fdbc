"""Requests through nginx, vLLM's router, and a compressing middleware.

The rows are recorded as described in tests/server/test_clients.py.
"""

import subprocess
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import nginx, vllm_router
from tests.client import chat_body, metric, post
from tests.client_rows import Outcome, as_recorded, read, refusal, row
from tests.conftest import KEY, PATIENCE, engine_running
from tests.local_server import serving
from tests.recorder import HEADER, recording

pytestmark = pytest.mark.long

GZIP = "starlette.middleware.gzip.GZipMiddleware"
KINDS = ("plain", "stream", "wrong")
HELD_SECONDS = 5
"""How long the upstream waits for its first event to be read if nginx may buffer it."""


def test_nginx_with_and_without_buffering(v1, tmp_path):
    rows = []
    for buffering in ("on", "off"):
        route = f"`proxy_buffering {buffering}`"
        with (
            recording(v1.url) as recorder,
            nginx.before(recorder.url, buffering, tmp_path) as url,
        ):
            cases = [_outcome(f"{url}/{kind}", kind, route) for kind in KINDS]
        found = row("nginx", [(each, recorder.exchanges[each["case"]]) for each in cases])
        rows.append(found | {"events": _events(buffering, tmp_path)})
    assert as_recorded("nginx", rows, {"nginx": nginx.version()}) == rows


def _outcome(url: str, kind: str, route: str) -> Outcome:
    """The outcome of a case that is requested without a client library."""
    body = chat_body(max_tokens=64, diversity=1.5 if kind == "wrong" else 0.5)
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json=body | {"stream": kind == "stream"},
        headers={"Authorization": f"Bearer {KEY}"},
        trust_env=False,
        timeout=PATIENCE,
    )
    about = {"case": kind, "route": route, "written": "top level"}
    if answer.status_code == 200:
        header = HEADER if HEADER in answer.headers else None
        return about | {"answer": "mean_entropy_after" in answer.text, "header": header}
    error = answer.json()["error"]
    details = {"status": answer.status_code, "param": error["param"], "text": error["message"]}
    return about | {"error": "HTTP", **details}


def _events(buffering: str, folder: Path) -> str:
    """Whether nginx passes on a stream's first event before there is a second.

    The upstream sends the second event when the client has read the first.
    """
    was_read = threading.Event()
    patience = HELD_SECONDS if buffering == "on" else None

    def upstream(request: Any) -> None:
        request.rfile.read(int(request.headers["Content-Length"]))
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        for event in (b"data: {}\n\n", b"data: [DONE]\n\n"):
            request.wfile.write(event)
            request.wfile.flush()
            was_read.wait(patience)

    pieces = []
    with (
        serving(upstream) as upstream_url,
        nginx.before(upstream_url, buffering, folder) as url,
        httpx.stream("POST", url, content=b"{}", trust_env=False, timeout=PATIENCE) as answer,
    ):
        for piece in answer.iter_raw():
            pieces.append(piece)
            was_read.set()
    return "held until the end" if len(pieces) == 1 else "as they are made"


def test_requests_through_vllms_router_are_counted_once(v1, tmp_path):
    """It requests a rendering before it forwards each request, which is counted once."""
    counters = ("dft:requests_total", "dft:requests_refused_total")
    before = [metric(v1, name) for name in counters]
    outcomes = []
    with recording(v1.url) as recorder:
        for kind in KINDS:
            with vllm_router.before(f"{recorder.url}/{kind}", tmp_path) as url:
                outcomes.append(_outcome(url, kind, "chat"))
    sent_on = [
        [each for each in recorder.exchanges[kind] if not each.path.endswith("/render")]
        for kind in KINDS
    ]
    assert any(len(recorder.exchanges[kind]) > 1 for kind in KINDS), "nothing was rendered"
    assert [metric(v1, name) for name in counters] == [before[0] + 2, before[1] + 1]
    rows = [row("vllm-router", list(zip(outcomes, sent_on, strict=True)))]
    code = "import importlib.metadata as m; print(m.version('vllm-router'))"
    python = vllm_router.ENVIRONMENT / "bin" / "python"
    version_of = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    versions = {"vllm-router": version_of.stdout.strip()}
    assert as_recorded("vllm-router", rows, versions) == rows


def test_render_requests_are_not_counted(model_folder, tmp_path):
    """A router may send one before each request that it forwards, if the server allows it."""
    bodies = {
        "/v1/chat/completions": chat_body(max_tokens=4),
        "/v1/completions": {"model": "demo", "prompt": "Once", "max_tokens": 4},
        "/v1/responses": {"model": "demo", "input": "Once", "max_output_tokens": 4},
    }
    names = ("dft:requests_total", "dft:requests_refused_total")
    with engine_running("v1_render", model_folder, tmp_path, "--enable-scale-out") as engine:
        for route, body in bodies.items():
            before = [metric(engine, name) for name in names]
            for level, status in ((0.5, 200), (7, 400)):
                answer = post(engine, f"{route}/render", body | {"diversity": level})
                assert answer.status_code == status, answer.text
            assert [metric(engine, name) for name in names] == before
            assert post(engine, route, body | {"diversity": 0.5}).status_code == 200
            assert post(engine, route, body | {"diversity": 7}).status_code == 400
            assert [metric(engine, name) for name in names] == [count + 1 for count in before]


def test_a_compressing_middleware(model_folder, tmp_path):
    """The header arrives, and a compressed body can be read."""
    flags = ("--middleware", GZIP)
    with (
        engine_running("v1_gzip", model_folder, tmp_path, *flags) as engine,
        recording(engine.url, encodings="gzip") as recorder,
    ):
        cases = [
            _outcome(f"{recorder.url}/{kind}", kind, f"`--middleware {GZIP}`") for kind in KINDS
        ]
    exchanges = [recorder.exchanges[kind][-1] for kind in KINDS]
    assert [exchange.encoding for exchange in exchanges] == ["gzip", None, None]
    assert all(exchange.header for exchange in exchanges[:2])
    plain, stream, wrong = cases
    found = {
        "client": "GZipMiddleware",
        "route": plain["route"],
        "written": plain["written"],
        "field": "arrives",
        "plain": read(plain),
        "stream": read(stream),
        "wrong": refusal(wrong),
    }
    versions = {name: version(name) for name in ("vllm", "starlette", "dftserve")}
    assert as_recorded("GZipMiddleware", [found], versions) == [found]
