"""Sends SIGTERM to a server with requests in flight; reports the answers and when it ended."""

import asyncio
import json
import os
import select
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

REQUESTS = 8
ATTEMPTS = 5
PATIENCE = 45.0
"""Seconds after the signal until a server counts as hanging; its own --shutdown-timeout is 30."""
FIRST_TOKENS = "vllm:time_to_first_token_seconds_count"
"""Counts in /metrics the requests that have their first token."""


@dataclass(frozen=True)
class Load:
    """The parameters of every request."""

    model: str
    field: bool
    stream: bool
    tokens: int
    """Output tokens of a request: enough to outlast the signal."""

    def body(self, index: int) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": f"Once {index}",
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": self.stream,
        }
        return {**body, "diversity": 0.5} if self.field else body


@dataclass(frozen=True)
class Outcome:
    """The outcome of one shutdown."""

    complete: int
    """Answers with all requested tokens."""
    aborted: int
    """Complete HTTP answers that report an early end."""
    lost: int
    """Connections that broke or got no answer."""
    statistics: int
    """Complete answers with statistics."""
    seconds: float | None
    """From the signal to the end of the server's process; None: it did not end."""


async def shut_down(url: str, key: str, process_id: int, load: Load) -> Outcome:
    """Send the requests, wait until each has its first token, then send SIGTERM to the server.

    Raises:
        RuntimeError: in every attempt some request ended before the signal.
    """
    headers = {"Authorization": f"Bearer {key}"}
    process = os.pidfd_open(process_id)
    # No pool: requests spread over the API servers as the kernel hands out connections.
    limits = httpx.Limits(max_keepalive_connections=0)
    client = httpx.AsyncClient(
        base_url=url, headers=headers, timeout=None, trust_env=False, limits=limits
    )
    async with client:
        requests = await _in_flight(client, load)
        signal.pidfd_send_signal(process, signal.SIGTERM)
        start = time.monotonic()
        ended = await asyncio.to_thread(_ends, process, PATIENCE)
        seconds = time.monotonic() - start
        for request in requests:  # An answer may still be in a socket buffer.
            await asyncio.wait([request], timeout=1 if ended else 0)
            request.cancel()
        results = await asyncio.gather(*requests, return_exceptions=True)
    os.close(process)
    kinds = Counter(result if isinstance(result, str) else "lost" for result in results)
    return Outcome(
        complete=kinds["complete"] + kinds["complete, with statistics"],
        aborted=kinds["aborted"],
        lost=kinds["lost"],
        statistics=kinds["complete, with statistics"],
        seconds=round(seconds, 2) if ended else None,
    )


async def _in_flight(client: httpx.AsyncClient, load: Load) -> list[asyncio.Task[str]]:
    """Requests that all have their first token and are not finished."""
    for _ in range(ATTEMPTS):
        before = await _first_tokens(client)
        requests = [asyncio.create_task(_outcome(client, load.body(i))) for i in range(REQUESTS)]
        while await _first_tokens(client) < before + REQUESTS:
            if any(request.done() for request in requests):
                break
            await asyncio.sleep(0.02)
        if not any(request.done() for request in requests):
            return requests
        await asyncio.gather(*requests)  # One ended before the last one's first token.
    raise RuntimeError(f"requests ended before the signal, {ATTEMPTS} times")


def _ends(process: int, timeout: float) -> bool:
    return bool(select.select([process], [], [], timeout)[0])


async def _first_tokens(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(FIRST_TOKENS)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def _outcome(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """`complete`, `complete, with statistics`, `aborted` or `lost`."""
    try:
        answer = await client.post("/v1/completions", json=body)
        chunks = _chunks(answer.text) if body["stream"] else [answer.json()]
    except (httpx.HTTPError, ValueError):
        return "lost"
    if answer.status_code != 200 or not chunks:
        return "lost"
    reasons = [choice.get("finish_reason") for c in chunks for choice in c.get("choices", [])]
    if reasons[-1:] != ["length"]:
        return "aborted"
    reported = next((c["diversity"] for c in chunks if "diversity" in c), {"choices": [None]})
    return "complete" if None in reported["choices"] else "complete, with statistics"


def _chunks(text: str) -> list[dict[str, Any]]:
    """The events of a stream that ended with [DONE]; otherwise none.

    Raises:
        ValueError: an event is not JSON.
    """
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(event) for event in events[:-1]] if events[-1:] == ["[DONE]"] else []
