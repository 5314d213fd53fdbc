"""What is added to vLLM's app: once, whichever way it came, and a guard where the field is lost."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from dftserve_vllm import app, hooks
from dftserve_vllm.body_limit import BodyLimit
from dftserve_vllm.response_middleware import ResponseMiddleware
from fastapi import FastAPI, Request
from starlette.middleware.gzip import GZipMiddleware


def made() -> FastAPI:
    fast = FastAPI()

    @fast.post("/v1/completions")
    async def completions(request: Request) -> dict:
        return {"got": json.loads(await request.body()), "choices": []}

    return fast


def post(fast: FastAPI, content: bytes, path: str = "/v1/completions") -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(fast)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=content)

    return asyncio.run(run())


def routes(fast: FastAPI) -> int:
    return sum(getattr(route, "path", "") == app.ROUTE for route in fast.routes)


def test_an_app_is_extended_once_by_both_ways():
    fast = made()
    app.EndpointPlugin().attach_router(fast)
    assert app.extend(fast) is fast
    assert routes(fast) == 1
    assert [each.cls for each in fast.user_middleware] == [ResponseMiddleware, BodyLimit]


def test_a_disabled_plug_in_adds_nothing_as_an_endpoint_plug_in_either(monkeypatch):
    monkeypatch.setenv("DFTSERVE_DISABLE", "1")
    fast = made()
    app.EndpointPlugin().attach_router(fast)
    assert routes(fast) == 0
    assert fast.user_middleware == []


def test_an_app_whose_middleware_is_built_is_built_again_with_ours_innermost():
    fast = made()
    fast.add_middleware(GZipMiddleware)
    fast.middleware_stack = fast.build_middleware_stack()
    app.extend(fast)
    ours = [ResponseMiddleware, BodyLimit]
    assert [each.cls for each in fast.user_middleware] == [GZipMiddleware, *ours]
    assert post(fast, b"{}").status_code == 200


def test_what_someone_put_around_the_app_stays():
    fast = made()
    seen = []

    async def around(scope, receive, send):
        seen.append(scope["path"])
        await stack(scope, receive, send)

    stack = fast.build_middleware_stack()
    fast.middleware_stack = around
    app.extend(fast)
    assert isinstance(fast.middleware_stack, ResponseMiddleware)
    assert post(fast, b"{}").status_code == 200
    assert seen == ["/v1/completions"]


@pytest.mark.parametrize("lost", ["state", "add_api_route", "user_middleware"])
def test_an_app_that_cannot_be_extended_starts_and_the_field_is_refused(monkeypatch, lost):
    """Such as what another plug-in's wrapper of `build_app` made of it."""
    found = vars(made()) | {"add_api_route": lambda *_, **__: None, "middleware_stack": None}
    del found[lost]
    strange = SimpleNamespace(**found)
    monkeypatch.setattr(hooks, "_installed", hooks.HOOKS)
    monkeypatch.setattr(hooks, "_failed", {})
    assert app.extend(strange) is strange
    assert lost in hooks.problems()[hooks.APP]
    assert hooks.refusal() is not None


@pytest.fixture
def guarded(monkeypatch) -> FastAPI:
    """The app of a server whose CompletionRequest could not be changed."""
    lost = hooks.REQUEST_HOOKS[1]
    monkeypatch.setattr(hooks, "_installed", hooks.HOOKS)
    monkeypatch.setattr(hooks, "problems", lambda: {lost.name: "it is not there"})
    return app.extend(made())


@pytest.mark.parametrize(
    "body",
    [
        {"diversity": 0.5},
        {"diversity": {"level": 0.2}},
        {"diversity": "wrong"},
        {"vllm_xargs": {"diversity": "0.5"}},
        '{"\\u0064iversity": 0.5}',
    ],
)
def test_where_the_field_would_be_ignored_it_is_refused(guarded, body):
    text = body if isinstance(body, str) else json.dumps(body)
    answer = post(guarded, text.encode())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "diversity"
    assert "to_sampling_params" in error["message"]


@pytest.mark.parametrize(
    "body",
    [{}, {"diversity": None}, {"diversity": 0}, {"vllm_xargs": {"other": 1}}, {"a": "diversity"}],
)
def test_other_requests_pass_the_guard_whole(guarded, body):
    answer = post(guarded, json.dumps(body).encode())
    assert answer.json() == {"got": body, "choices": []}


def test_a_body_in_many_pieces_passes_the_guard_whole(guarded):
    messages = [
        {"type": "http.request", "body": b'{"a"', "more_body": True},
        {"type": "http.request", "body": b": 1}", "more_body": False},
    ]
    sent = []

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [],
        "app": SimpleNamespace(),
    }
    asyncio.run(guarded(scope, receive, send))
    assert b'"got":{"a":1}' in sent[-1]["body"]


def test_no_guard_where_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(hooks, "problems", dict)
    fast = app.extend(made())
    assert [one.cls for one in fast.user_middleware] == [ResponseMiddleware, BodyLimit]
