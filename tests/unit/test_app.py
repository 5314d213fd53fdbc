"""Extending vLLM's app: once, by whichever route, with a guard where the field would be lost."""

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


def make_app() -> FastAPI:
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


def count_routes(fast: FastAPI) -> int:
    return sum(getattr(route, "path", "") == app.ROUTE for route in fast.routes)


def test_an_app_extended_by_both_routes_is_extended_once():
    fast = make_app()
    app.EndpointPlugin().attach_router(fast)
    assert app.extend(fast) is fast
    assert count_routes(fast) == 1
    assert [each.cls for each in fast.user_middleware] == [ResponseMiddleware, BodyLimit]


def test_a_disabled_endpoint_plug_in_adds_nothing(monkeypatch):
    monkeypatch.setenv("DFTSERVE_DISABLE", "1")
    fast = make_app()
    app.EndpointPlugin().attach_router(fast)
    assert count_routes(fast) == 0
    assert fast.user_middleware == []


def test_an_already_built_middleware_stack_is_rebuilt_with_ours_innermost():
    fast = make_app()
    fast.add_middleware(GZipMiddleware)
    fast.middleware_stack = fast.build_middleware_stack()
    app.extend(fast)
    ours = [ResponseMiddleware, BodyLimit]
    assert [each.cls for each in fast.user_middleware] == [GZipMiddleware, *ours]
    assert post(fast, b"{}").status_code == 200


def test_a_wrapper_around_the_app_is_kept():
    fast = make_app()
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
    """Such as one that another plug-in's wrapper of `build_app` returned."""
    attributes = vars(make_app()) | {
        "add_api_route": lambda *_, **__: None,
        "middleware_stack": None,
    }
    del attributes[lost]
    strange = SimpleNamespace(**attributes)
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
    return app.extend(make_app())


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
def test_the_guard_refuses_a_field_that_would_be_ignored(guarded, body):
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
def test_other_requests_pass_the_guard_unchanged(guarded, body):
    answer = post(guarded, json.dumps(body).encode())
    assert answer.json() == {"got": body, "choices": []}


def test_a_body_in_several_pieces_passes_the_guard_unchanged(guarded):
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


def test_no_guard_is_added_without_hook_problems(monkeypatch):
    monkeypatch.setattr(hooks, "problems", dict)
    fast = app.extend(make_app())
    assert [each.cls for each in fast.user_middleware] == [ResponseMiddleware, BodyLimit]
