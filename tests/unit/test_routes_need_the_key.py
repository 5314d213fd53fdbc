"""Every route that the plug-in adds to vLLM's app requires the server's API key."""

import asyncio
import re

import httpx
import pytest
from dftserve_vllm import app
from fastapi import FastAPI
from starlette.routing import BaseRoute

from tests.vllm_app import built

KEY = "the-servers-key"
REFUSED = 401


@pytest.fixture(params=["hook", "plug-in"])
def attach(request):
    """The two methods by which our routes are added to an app."""
    return app.extend if request.param == "hook" else app.EndpointPlugin().attach_router


@pytest.fixture
def served(attach, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("DFTSERVE_DISABLE", raising=False)
    monkeypatch.setattr("vllm.plugins.plugins_loaded", True)  # No hooks in this process.

    def serve(*flags: str) -> tuple[FastAPI, list[BaseRoute]]:
        """The app, and the routes that are ours."""
        fast = built(*flags)
        stock = list(fast.routes)
        attach(fast)
        return fast, [route for route in fast.routes if route not in stock]

    return serve


def statuses(fast: FastAPI, route: BaseRoute, key: str | None) -> dict[str, int]:
    """A route's status by HTTP method."""
    path = re.sub(r"{[^}]*}", "x", getattr(route, "path", "")) or "/"
    methods = getattr(route, "methods", None) or {"GET", "POST"}
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def run() -> dict[str, int]:
        transport = httpx.ASGITransport(fast, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return {
                method: (await client.request(method, path, headers=headers)).status_code
                for method in sorted(methods)
            }

    return asyncio.run(run())


def unprotected(fast: FastAPI, routes: list[BaseRoute]) -> list[str]:
    """The methods and paths of routes that answer without the key or with a wrong one."""
    return [
        f"{method} {getattr(route, 'path', route)}"
        for route in routes
        for key in (None, "another", "")
        for method, status in statuses(fast, route, key).items()
        if status != REFUSED
    ]


def test_every_route_of_the_plug_in_requires_the_key(served):
    fast, ours = served("--api-key", KEY)
    assert app.ROUTE in {getattr(route, "path", None) for route in ours}
    assert unprotected(fast, ours) == []
    for route in ours:
        assert not {REFUSED, 404, 405, 500} & set(statuses(fast, route, KEY).values())


def test_a_server_without_a_key_answers(served):
    fast, ours = served()
    assert ours
    for route in ours:
        assert set(statuses(fast, route, None).values()) == {200}


@pytest.mark.parametrize("path", ["/dft/open", "/dft/{name}", "/metrics/dft"])
def test_a_new_unprotected_route_is_detected(served, monkeypatch, path):
    extend = app._extend

    def with_more(fast: FastAPI) -> None:
        extend(fast)
        fast.add_api_route(path, lambda: "open", methods=["GET", "POST"])

    monkeypatch.setattr(app, "_extend", with_more)
    fast, ours = served("--api-key", KEY)
    assert any(path in route for route in unprotected(fast, ours))
