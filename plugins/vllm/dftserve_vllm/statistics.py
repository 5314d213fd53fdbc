"""The API process's side of the figures: fetched from the workers, counted, exported.

Answers that end together are asked for together: one call to the workers serves all that came
while the last one was under way.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from prometheus_client import Counter, Histogram

from dftserve.sampling.slots import AFTER, BEFORE, CHANGED, TEMPERATURE
from dftserve_vllm import request_context

logger = logging.getLogger("vllm.dftserve")

WORKER_METHOD = "dftserve_figures"
"""Set on vLLM's worker class by `hooks`."""


class Metrics:
    """The `dft:*` metrics of this process."""

    def __init__(self) -> None:
        self.requests = Counter("dft:requests", "Requests with an active diversity.", ["law"])
        self.tokens = Counter("dft:tokens", "Tokens sampled with an active diversity.")
        self.faults = Counter("dft:faults", "Steps passed through unchanged after a fault.")
        self.nan_rows = Counter("dft:nan_rows", "Rows passed through: NaN or nothing finite.")
        nats = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12)
        self.before = Histogram(
            "dft:entropy_before_nats", "A choice's mean entropy before.", buckets=nats
        )
        self.after = Histogram(
            "dft:entropy_after_nats", "A choice's mean entropy after.", buckets=nats
        )
        self.temperature = Histogram(
            "dft:temperature",
            "A choice's mean temperature.",
            buckets=(0.25, 0.5, 0.75, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4),
        )
        self.changed = Histogram(
            "dft:tokens_changed",
            "The share of a choice's tokens that the new temperature changed.",
            buckets=(0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
        )
        self._seen = {"faults": 0, "nan_rows": 0}

    def count(self, law: str, means: list[list[float] | None]) -> None:
        self.requests.labels(law).inc()
        for values in means:
            if values is None:
                continue
            self.tokens.inc(values[0])
            self.before.observe(values[BEFORE])
            self.after.observe(values[AFTER])
            self.temperature.observe(values[TEMPERATURE])
            self.changed.observe(values[CHANGED])

    def follow(self, counters: dict[str, int]) -> None:
        """Bring the counters up to the workers'."""
        for name, metric in (("faults", self.faults), ("nan_rows", self.nan_rows)):
            metric.inc(max(counters[name] - self._seen[name], 0))
            self._seen[name] = max(counters[name], self._seen[name])

    def totals(self) -> dict[str, int]:
        return dict(self._seen)


_metrics: Metrics | None = None


def metrics() -> Metrics:
    """Made on first use: the registry refuses a second set of the same names."""
    global _metrics
    if _metrics is None:
        _metrics = Metrics()
    return _metrics


class Collector:
    """Fetches figures from one engine's workers."""

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client
        self._wanted: dict[str, int] = {}
        self._next: asyncio.Task[dict[str, Any]] | None = None
        self._turn = asyncio.Lock()

    async def take(self, produced: dict[str, int]) -> dict[str, Any]:
        """The figures by choice identity; empty where the workers did not answer.

        Args:
            produced: how many tokens each choice produced.
        """
        self._wanted.update(produced)
        if self._next is None:
            self._next = asyncio.create_task(self._ask())
        # A client that goes away must not take the others' figures with it.
        return await asyncio.shield(self._next)

    async def _ask(self) -> dict[str, Any]:
        async with self._turn:
            wanted, self._wanted, self._next = self._wanted, {}, None
            try:
                answers = await self._engine.collective_rpc(WORKER_METHOD, args=(wanted,))
            except Exception:
                logger.exception("diversity: the workers' figures cannot be had")
                return {}
        answer = next((given for given in answers if given is not None), None)
        if answer is None:
            return {}
        metrics().follow(answer)
        return answer["figures"]


_collectors: dict[int, Collector] = {}


def collector(engine_client: Any) -> Collector:
    return _collectors.setdefault(id(engine_client), Collector(engine_client))


async def observed(
    engine_client: Any, outputs: AsyncGenerator[Any, None], item: request_context.PromptContext
) -> AsyncGenerator[Any, None]:
    """The engine's outputs as they are; the item is filled before the last one goes out."""
    produced = [0] * item.choices
    try:
        async for output in outputs:
            for choice in output.outputs:
                produced[choice.index] += len(choice.token_ids)
            if output.finished:
                wanted = {item.choice_identity(i): n for i, n in enumerate(produced)}
                means = await collector(engine_client).take(wanted)
                item.fill(means)
                metrics().count(item.diversity.law, [means.get(name) for name in wanted])
            yield output
    finally:
        await outputs.aclose()
