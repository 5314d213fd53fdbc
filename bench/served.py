"""What the field costs a server over HTTP: throughput and time per output token.

    python bench/served.py [--pairs 20] [--concurrency C ...] [--vocabulary V ...] [--starts 5]
                           [--output bench/results/served.json]

Three vLLM servers for each vocabulary, at the same time: stock (DFTSERVE_DISABLE=1), ours (with the
plug-in), and peer (stock with `processors.Peer`). The variants take turns, round by round:
    stock     on stock
    min_p     on stock, with vLLM's own min_p .05 and temperature 1.5
    no field  on ours, without the field in any request
    tenth     on ours, a tenth of the requests, at least one, with diversity .5
    field     on ours, every request with diversity .5
    peer      on peer, the law of qr-sampler on every row
A round is a number of concurrent streamed completions of equal length, with the openai client.
Measured are output tokens per second from the first request to the end of the last answer, and the
time per output token of a request, from its first chunk to its last, as the median of the round.
Client and server share the machine, so every variant includes the client's cost. Also measured are
the additional time that a server takes to start, to a poll of a quarter second, and the plug-in's
memory.
Short answers of one or two tokens, which show the cost per answer, have rows of their own: answers
per second of `no field` and `field`, with 32 clients that ask eight times each in a round. With
--only-short only these are measured, and the rest of an existing output file is kept.
The last line is one JSON document. Absolute times depend on the machine; the ratios are the
result.
"""

import asyncio
import json
import os
import time
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import torch
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from dftserve.serve import Server, running

from provenance import machine, versions
from ratios import ratio, shown
from tiny_model import MAX_LENGTH, TOKENS, VOCABULARIES, saved

CONCURRENCIES = (1, 8, 32, 64)
DIVERSITY = 0.5
BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "served.json"
SHORT = (1, 2)
"""Output tokens of a short answer."""
SHORT_CONCURRENCY = 32
SHORT_ANSWERS = 8
"""Answers per client and round: a single wave would be over in a few steps."""

Counts = tuple[int, ...]
SLOTS = max(CONCURRENCIES)
FLAGS = (
    "--enforce-eager",
    f"--max-model-len={MAX_LENGTH}",
    f"--max-num-seqs={SLOTS}",
    f"--kv-cache-memory-bytes={256 << 20}",
    "--no-enable-prefix-caching",
    "--seed=0",
)
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "OMP_NUM_THREADS": "1",
    # The engine's worker runs in the engine's process, as it does on one GPU. With two processes,
    # each spins while it waits for the other and for a second after, so that an idle server would
    # use two cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Long enough that a server never closes a connection just when the client reuses it.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
STOCK = {"DFTSERVE_DISABLE": "1"}
WITH_BENCH = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
SERVERS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "stock": ((), STOCK),
    "ours": ((), {"DFTSERVE_DISABLE": ""}),
    "peer": (("--logits-processors", "processors:Peer"), {**STOCK, "PYTHONPATH": WITH_BENCH}),
}
"""The additional flags and environment of each server."""


@dataclass(frozen=True)
class Way:
    server: str
    share: float = 0.0
    """Share of the requests with the field; at least one request unless it is 0."""
    temperature: float = 1.0
    min_p: float = 0.0

    def asking(self, concurrency: int) -> int:
        return max(1, int(self.share * concurrency)) if self.share else 0


WAYS = {
    "stock": Way("stock"),
    "min_p": Way("stock", temperature=1.5, min_p=0.05),
    "no field": Way("ours"),
    "tenth": Way("ours", share=0.1),
    "field": Way("ours", share=1.0),
    "peer": Way("peer"),
}

SHORT_WAYS = ("stock", "no field", "field")


@click.command()
@click.option(
    "--pairs", default=20, type=click.IntRange(min=1), help="Rounds; each runs every variant once."
)
@click.option(
    "--concurrency",
    "concurrencies",
    multiple=True,
    type=click.IntRange(1, SLOTS),
    default=CONCURRENCIES,
    show_default=True,
)
@click.option(
    "--vocabulary", "vocabularies", multiple=True, default=VOCABULARIES, show_default=True
)
@click.option(
    "--starts",
    default=5,
    type=click.IntRange(min=1),
    help="Number of starts of each server, to measure the start-up time.",
)
@click.option("--only-short", is_flag=True, help="Measure only the short answers.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def main(
    pairs: int,
    concurrencies: Counts,
    vocabularies: Counts,
    starts: int,
    only_short: bool,
    output: Path,
):
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    short: list[dict[str, Any]] = []
    made = {
        "machine": machine(),
        "versions": versions("dftserve-vllm", "vllm", "transformers", "numpy", "openai"),
        "pairs": pairs,
    }
    if only_short:
        document = json.loads(output.read_text()) if output.exists() else {}
    else:
        document = {
            "what": "streamed completions over HTTP, ratios to a stock server, 95 % intervals",
            **made,
            "memory_bytes": memory_bytes(vocabularies),
            "start_seconds": start_seconds(starts),
            "rows": rows,
        }
    document["short_answers"] = {**made, "rows": short}
    for vocabulary in vocabularies:
        with saved(vocabulary) as model, ExitStack() as stack:
            names = ("stock", "ours") if only_short else SERVERS
            servers = {name: stack.enter_context(serving(name, model)) for name in names}
            if not only_short:
                rows += asyncio.run(measure(servers, vocabulary, concurrencies, pairs))
            short += asyncio.run(measure_short(servers, vocabulary, pairs))
        output.write_text(json.dumps(document, indent=1) + "\n")
    if not only_short:
        print(table(rows, "throughput"))
        print(table(rows, "time_per_token"))
    print(short_table(short))
    print(json.dumps(document))


def serving(name: str, model: str) -> AbstractContextManager[Server]:
    flags, environment = SERVERS[name]
    return running(model, *FLAGS, *flags, env={**ENVIRONMENT, **environment})


async def measure(
    servers: dict[str, Server], vocabulary: int, concurrencies: Counts, pairs: int
) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        ways = await ready(stack, servers, tuple(WAYS))
        return [await compare(ways, vocabulary, count, pairs) for count in concurrencies]


async def measure_short(
    servers: dict[str, Server], vocabulary: int, pairs: int
) -> list[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        ways = await ready(stack, servers, SHORT_WAYS)
        return [await compare_short(ways, vocabulary, tokens, pairs) for tokens in SHORT]


async def ready(
    stack: AsyncExitStack, servers: dict[str, Server], names: tuple[str, ...]
) -> dict[str, "Turns"]:
    """The variants, each with a client of its server, after a check that it applies the field."""
    clients = {
        name: await stack.enter_async_context(client_of(server)) for name, server in servers.items()
    }
    ways = {
        name: Turns(clients[way.server], servers[way.server], way)
        for name, way in WAYS.items()
        if name in names
    }
    for turns in ways.values():
        await turns.probe()
    return ways


def client_of(server: Server) -> AsyncOpenAI:
    # Loopback requests must not go through a proxy that the environment names.
    plain = DefaultAsyncHttpxClient(trust_env=False)
    return AsyncOpenAI(base_url=server.url, api_key="EMPTY", max_retries=0, http_client=plain)


@dataclass(frozen=True)
class Turns:
    """One variant, on its server."""

    client: AsyncOpenAI
    server: Server
    way: Way

    async def probe(self) -> None:
        """Check that the server applies the field if, and only if, the variant asks for it."""
        asks = self.way.share > 0
        answer = await self.client.completions.create(**self.body(0, 8, asks))
        assert ("diversity" in (answer.model_extra or {})) == asks, answer

    async def round(self, concurrency: int, tokens: int) -> tuple[float, float]:
        """Output tokens per second of all requests, and seconds per output token of one."""
        # The client drops idle connections, so this opens all of them before the round.
        await asyncio.gather(*(self.client.models.list() for _ in range(concurrency)))
        asking = self.way.asking(concurrency)
        start = time.perf_counter()
        spans = await asyncio.gather(
            *(self.stream(self.body(i, tokens, i < asking)) for i in range(concurrency))
        )
        seconds = time.perf_counter() - start
        return concurrency * tokens / seconds, median(spans) / (tokens - 1)

    async def short_round(self, tokens: int) -> float:
        """Answers per second, with `tokens` tokens each."""
        count = SHORT_CONCURRENCY
        await asyncio.gather(*(self.client.models.list() for _ in range(count)))
        asking = self.way.asking(count)
        start = time.perf_counter()
        await asyncio.gather(*(self.ask_often(i, tokens, i < asking) for i in range(count)))
        return count * SHORT_ANSWERS / (time.perf_counter() - start)

    async def ask_often(self, i: int, tokens: int, asks: bool) -> None:
        for _ in range(SHORT_ANSWERS):
            await self.stream(self.body(i, tokens, asks))

    async def stream(self, body: dict[str, Any]) -> float:
        """Seconds from the first chunk to the last, which must report that all tokens arrived."""
        stream = await self.client.completions.create(**body, stream=True)
        chunks = [(time.perf_counter(), chunk) async for chunk in stream]
        assert chunks[-1][1].choices[0].finish_reason == "length", chunks[-1]
        return chunks[-1][0] - chunks[0][0]

    def body(self, i: int, tokens: int, asks: bool) -> dict[str, Any]:
        extra = {"ignore_eos": True, "min_p": self.way.min_p}
        return {
            "model": self.server.model,
            "prompt": [1 + i, 7, 11, 13],
            "max_tokens": tokens,
            "temperature": self.way.temperature,
            "extra_body": {**extra, "diversity": DIVERSITY} if asks else extra,
        }


async def compare(
    ways: dict[str, Turns], vocabulary: int, concurrency: int, pairs: int
) -> dict[str, Any]:
    """Alternating rounds of all variants; the order rotates so that none is always first."""
    tokens = TOKENS.get(vocabulary, 32)
    for turns in ways.values():
        await turns.round(concurrency, tokens)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            speed, seconds = await ways[name].round(concurrency, tokens)
            speeds[name].append(speed)
            times[name].append(seconds)
    return {
        "vocabulary": vocabulary,
        "concurrency": concurrency,
        "output_tokens": tokens,
        "stock_tokens_per_second": round(median(speeds["stock"]), 1),
        "stock_ms_per_token": round(1000 * median(times["stock"]), 3),
        "throughput": {name: ratio(speeds[name], speeds["stock"]) for name in names[1:]},
        "time_per_token": {name: ratio(times[name], times["stock"]) for name in names[1:]},
    }


async def compare_short(
    ways: dict[str, Turns], vocabulary: int, tokens: int, pairs: int
) -> dict[str, Any]:
    """As `compare`, with answers so short that the cost per answer dominates."""
    for turns in ways.values():
        await turns.short_round(tokens)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            speeds[name].append(await ways[name].short_round(tokens))
    return {
        "vocabulary": vocabulary,
        "concurrency": SHORT_CONCURRENCY,
        "output_tokens": tokens,
        "stock_answers_per_second": round(median(speeds["stock"]), 1),
        "answers_per_second": {name: ratio(speeds[name], speeds["stock"]) for name in names[1:]},
    }


def start_seconds(starts: int) -> dict[str, Any]:
    """Seconds until a server answers, stock and ours in turn, after one start of each to fill the
    caches."""
    taken: dict[str, list[float]] = {"stock": [], "ours": []}
    with saved(VOCABULARIES[0]) as model:
        for turn in range(starts + 1):
            for name in sorted(taken, reverse=turn % 2 == 0):
                start = time.perf_counter()
                with serving(name, model):
                    taken[name].append(time.perf_counter() - start)
    taken = {name: seconds[1:] for name, seconds in taken.items()}
    stock, ours = median(taken["stock"]), median(taken["ours"])
    return {
        "starts": starts,
        "stock": round(stock, 2),
        "ours": round(ours, 2),
        "added": round(ours - stock, 2),
        "ours_to_stock": ratio(taken["ours"], taken["stock"]),
    }


def memory_bytes(vocabularies: Counts) -> dict[str, Any]:
    """Bytes of a request's slot, and of the CPU kernel's scratch buffers for each vocabulary."""
    from dftserve_vllm.worker_state import WorkerState

    from dftserve.sampling.backends.numba import scratch

    state = vars(WorkerState(SLOTS, 1, torch.device("cpu")).slots).values()
    by_slot = [t for t in state if isinstance(t, torch.Tensor) and t.shape[:1] == (SLOTS,)]
    buffers = {v: scratch(v) for v in vocabularies}
    return {
        "slot": sum(t.nbytes for t in by_slot) // SLOTS,
        "room": {v: sum(array.nbytes for array in arrays) for v, arrays in buffers.items()},
    }


def table(rows: list[dict[str, Any]], measured: str) -> str:
    names = list(WAYS)[1:]
    lines = [f"{measured:>14} {'V':>7} {'C':>3} " + " ".join(f"{name:>18}" for name in names)]
    for row in rows:
        cells = " ".join(f"{shown(row[measured][name]):>18}" for name in names)
        lines.append(f"{'':>14} {row['vocabulary']:>7} {row['concurrency']:>3} {cells}")
    return "\n".join(lines)


def short_table(rows: list[dict[str, Any]]) -> str:
    names = SHORT_WAYS[1:]
    lines = [f"{'short answers':>14} {'V':>7} {'T':>3} " + " ".join(f"{n:>18}" for n in names)]
    for row in rows:
        cells = " ".join(f"{shown(row['answers_per_second'][name]):>18}" for name in names)
        lines.append(f"{'':>14} {row['vocabulary']:>7} {row['output_tokens']:>3} {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
