"""Requests to an engine under test, many at once, in the ways a user sends them."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpx
import openai

from dftserve.stories.grammar import PROMPTS
from tests.conftest import KEY, PATIENCE, Engine

LIVELY = {"ignore_eos": True, "presence_penalty": 2.0, "frequency_penalty": 1.0}
"""A story past its end loops over tokens with a probability near 1, which no temperature changes;
the penalties prevent this."""


def sync_client(engine: Engine) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)


def chat_body(prompt: str | None = None, **fields: Any) -> dict[str, Any]:
    prompt = prompt if prompt is not None else next(iter(PROMPTS))
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}], **fields}


def some_prompt(random_source: random.Random) -> str:
    return random_source.choice(list(PROMPTS))


def gather(
    engine: Engine, requests: Iterable[tuple[str, dict[str, Any]]], at_once: int = 16
) -> list[httpx.Response]:
    """POST (path, body) pairs, `at_once` in flight, answers in the order of the requests."""

    async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
        return await client.post(path, json=body)

    return _all(engine, [(path, body) for path, body in requests], post, at_once)


def gather_bytes(
    engine: Engine, requests: Iterable[tuple[str, bytes]], at_once: int = 16
) -> list[httpx.Response]:
    """As `gather`, with the bodies as bytes."""

    async def post(client: httpx.AsyncClient, path: str, body: bytes) -> httpx.Response:
        return await client.post(path, content=body, headers={"Content-Type": "application/json"})

    return _all(engine, list(requests), post, at_once)


def _all(
    engine: Engine,
    requests: list[tuple[str, Any]],
    post: Callable[..., Awaitable[httpx.Response]],
    at_once: int,
) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        turn = asyncio.Semaphore(at_once)
        headers = {"Authorization": f"Bearer {KEY}"}
        # The server may close a kept-alive connection just when the client reuses it.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=engine.url, headers=headers, timeout=PATIENCE, trust_env=False, limits=limits
        ) as client:

            async def one(path: str, body: Any) -> httpx.Response:
                async with turn:
                    return await post(client, path, body)

            return await asyncio.gather(*(one(path, body) for path, body in requests))

    return asyncio.run(run())


def post(engine: Engine, path: str, body: dict[str, Any]) -> httpx.Response:
    return gather(engine, [(path, body)])[0]


def get(engine: Engine, path: str, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{engine.url}{path}", headers=headers, timeout=PATIENCE, trust_env=False)


def metric(engine: Engine, name: str) -> float:
    """The sum of a metric's samples in /metrics."""
    lines = [line for line in get(engine, "/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
