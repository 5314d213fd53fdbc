"""Does a server keep its guarantees over many requests of every kind, for a long time?

    python bench/soak.py [--scale 1] [--seed 0] [--only PHASE]... [--output bench/results/soak.json]

Real vLLM servers on this machine's CPU (the V1 runner) with the stories' test model: `ours` with
the plug-in, `stock` with DFTSERVE_DISABLE=1. Phases, and their sizes at --scale 1:
    fuzz         20,000 bodies (tests/fuzz_bodies.py) to both: no 5xx that stock does not have, a
                 400 that names the parameter for every wrong value, and no client text or key in
                 the log
    served       100,000 short requests from 16 clients, half with the field: the memory of all of
                 the server's processes (PSS without file pages) grows by at most 1 % after the
                 first tenth; stock's growth under the same requests is reported as well
    disconnects  2,000 streams that their clients leave at random: none is left running or waiting
    schema       1,000 answers with a JSON schema at `diversity` 1: valid as often as stock's
    overload     4 clients per slot for 300 s: only 200, 429 and 503, and /health answers; stock's
                 times under the same load are reported as well
The failure of a phase is recorded, and the others run; a server that died is restarted. With
--only, the given phases replace those of an existing output with the same settings. The last line
is one JSON document. The exit code is 1 if a guarantee is broken (bench/soak_promises.py).
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import click
import httpx
import jsonschema
import psutil
import soak_table
from soak_promises import SECONDS_TO_IDLE, broken_promises

from dftserve.serve import running
from tests.client import LIVELY, chat_body, gather, gather_bytes, get, metric, some_prompt
from tests.conftest import FLAGS, KEY, PATIENCE, Engine, tuned_model
from tests.fuzz_bodies import CANARY, asked, complaint

from provenance import machine, versions

RESULTS = Path(__file__).parent / "results" / "soak.json"
SIZES = {"fuzz": 20_000, "served": 100_000, "disconnects": 2000, "schema": 1000, "overload": 300}
"""Bodies, requests to each server, streams, requests to each server, seconds for each server."""
SMALLEST = 10
"""Minimum size of every phase: memory is measured after each tenth."""
BATCH = 500
"""Bodies in memory at a time."""
CLIENTS = 16
SLOTS = 16
"""The server's --max-num-seqs."""
OVERLOAD = 4
"""Clients per slot."""
LONG_TOKENS = 200
"""Tokens of a stream that its client leaves: more than any client reads."""
HEALTH_WATCH = Path(__file__).parent / "health_watch.py"
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "OMP_NUM_THREADS": "1",
    # By default oneDNN caches the kernels of 1,024 shapes of a step: tens of MB that accumulate
    # over thousands of requests, with and without the plug-in (docs/log.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    # Long enough that a server never closes a connection just when the client reuses it.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
SERVERS = {"ours": {"DFTSERVE_DISABLE": ""}, "stock": {"DFTSERVE_DISABLE": "1"}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["fox", "owl", "hare"]},
        "old": {"type": "boolean"},
        "friends": {"type": "array", "items": {"enum": ["Anna", "Ben"]}, "maxItems": 3},
    },
    "required": ["name", "kind", "old", "friends"],
    "additionalProperties": False,
}
COMPACT = '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}'
"""Without this, a small model may write whitespace until it reaches its token limit."""


@click.command()
@click.option("--scale", default=1.0, type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", default=0)
@click.option("--only", multiple=True, type=click.Choice(list(SIZES)))
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path))
def main(scale: float, seed: int, only: tuple[str, ...], output: Path) -> None:
    sizes = {name: max(SMALLEST, round(scale * size)) for name, size in SIZES.items()}
    document: dict[str, Any] = {
        "what": "promises of a server over many requests",
        "scale": scale,
        "seed": seed,
        "sizes": sizes,
        "machine": machine(),
        "versions": versions("vllm", "httpx", "jsonschema"),
        "phases": {},
        "kept": False,
    }
    if only and output.exists():
        document["phases"] = phases_of(json.loads(output.read_text()), document)
    with tempfile.TemporaryDirectory() as place, Servers(tuned_model(), Path(place)) as servers:
        for name in [name for name in sizes if name in only or not only]:
            found = guarded(name, sizes[name], random.Random(f"{seed} {name}"), servers)
            document = with_phase(document, name, found)
            # After each phase, so that an aborted run leaves its results.
            output.write_text(json.dumps(document, indent=1) + "\n")
    print(soak_table.table(document))
    print(json.dumps(document))
    sys.exit(1 if any(phase["broken"] for phase in document["phases"].values()) else 0)


def phases_of(before: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The phases of an earlier document.

    Raises:
        ClickException: it has other sizes, or is from another machine or other versions.
    """
    for name in ("scale", "sizes", "seed", "machine", "versions"):
        if before.get(name) != now[name]:
            raise click.ClickException(
                f"{name}: the output has {before.get(name)}, this run {now[name]}; run all phases, "
                "or name another --output."
            )
    return before["phases"]


def with_phase(document: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The document with the phase added, in the order of SIZES; `kept` if all phases are there and
    none broke a guarantee."""
    newer = {**document["phases"], name: found}
    phases = {each: newer[each] for each in SIZES if each in newer}
    kept = len(phases) == len(SIZES) and not any(phase["broken"] for phase in phases.values())
    return {**document, "phases": phases, "kept": kept}


class Servers:
    """The servers by name, started on first use, and restarted on the next use after they died."""

    def __init__(self, model: Path, place: Path) -> None:
        self._model = model
        self._place = place
        self._running: dict[str, tuple[Engine, ExitStack]] = {}
        self._starts = 0

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._running):
            self._stop(name)

    def get(self, name: str) -> Engine:
        if name not in self._running:
            self._starts += 1
            log = self._place / f"{name}-{self._starts}.log"
            stack = ExitStack()
            environment = {**ENVIRONMENT, **SERVERS[name]}
            flags = (*FLAGS, COMPACT)
            server = stack.enter_context(
                running(str(self._model), *flags, env=environment, log=log, timeout=PATIENCE)
            )
            url, no_fault = server.url.removesuffix("/v1"), self._place / "no-fault"
            engine = Engine(name, url, self._model, no_fault, log, server.pid)
            self._running[name] = engine, stack
        return self._running[name][0]

    def remove_dead(self) -> list[str]:
        """Stop the servers that no longer answer at /health; returns their names."""
        dead = [name for name, (engine, _) in self._running.items() if not _is_healthy(engine)]
        for name in dead:
            self._stop(name)
        return dead

    def _stop(self, name: str) -> None:
        _, stack = self._running.pop(name)
        stack.close()


def _is_healthy(engine: Engine) -> bool:
    try:
        return get(engine, "/health").status_code == 200
    except httpx.HTTPError:
        return False


Phase = Callable[[int, random.Random, Servers], dict[str, Any]]


def guarded(name: str, size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """A phase's result or error, its seconds, the servers that died, and the broken guarantees."""
    print(f"{name}: {size:,}", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        found: dict[str, Any] = {"result": PHASES[name](size, source, servers)}
    except Exception as error:  # noqa: BLE001 - the other phases run whatever the error is
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:500]}
    found["died"] = servers.remove_dead()
    found["seconds"] = round(time.monotonic() - start, 1)
    found["broken"] = broken_promises(name, found)
    print(f"    {found['seconds']} s, broken: {found['broken']}", file=sys.stderr, flush=True)
    return found


def fuzz(size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """Send bodies to both servers, in batches; counts wrong answers and leaks into our log."""
    stock, ours = servers.get("stock"), servers.get("ours")
    starting = ours.log.read_bytes()
    complaints: Counter[str] = Counter()
    examples: dict[str, str] = {}
    refused, faults = 0, {"ours": 0, "stock": 0}
    for first in range(0, size, BATCH):
        bodies = [asked(source, number) for number in range(first, min(first + BATCH, size))]
        requests = [(one.path, one.body) for one in bodies]
        expected, got = gather_bytes(stock, requests), gather_bytes(ours, requests)
        refused += sum(answer.status_code == 400 for answer in got)
        faults["ours"] += sum(answer.status_code >= 500 for answer in got)
        faults["stock"] += sum(answer.status_code >= 500 for answer in expected)
        for one, theirs, answer in zip(bodies, expected, got, strict=True):
            if problem := complaint(one, theirs, answer):
                complaints[problem] += 1
                example = f"{one.path} {one.body[-300:]!r}: {answer.text[:300]}"
                examples.setdefault(problem, example)
    logged = ours.log.read_bytes()[len(starting) :]
    return {
        "bodies": size,
        "refused": refused,
        "faults": faults,
        "complaints": dict(complaints),
        "examples": examples,
        "in_log": {
            "a client's text": logged.count(CANARY.encode()),
            "the key": logged.count(KEY.encode()),
        },
    }


def served(size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """Short requests in ten parts, with the memory after each part, when no request runs. Each part
    goes to one server after the other, so that both have served the same number."""
    runs = {name: _Run(servers.get(name), copy(source)) for name in SERVERS}
    for tenth in range(10):
        part = range(size * tenth // 10, size * (tenth + 1) // 10)
        for run in runs.values():
            run.serve(part)
    ours, stock = (runs[name].measures() for name in ("ours", "stock"))
    return {
        "requests": size,
        "clients": CLIENTS,
        "memory": "PSS, less pages of files, of all processes of the server, after each tenth",
        **ours,
        "stock": stock,
        "grown_mib": {"ours": _grown(ours), "stock": _grown(stock)},
    }


class _Run:
    """The outcomes, the speed and the memory of one server."""

    def __init__(self, engine: Engine, source: random.Random) -> None:
        self._engine = engine
        self._source = source
        self._outcomes: Counter[str] = Counter()
        self._busy = 0.0
        self._memory: list[dict[str, float]] = []

    def serve(self, part: range) -> None:
        start = time.monotonic()
        self._outcomes += asyncio.run(_served(self._engine, iter(part), self._source))
        self._busy += time.monotonic() - start
        self._memory.append(own_mib(self._engine.pid))

    def measures(self) -> dict[str, Any]:
        totals = [sum(each.values()) for each in self._memory]
        names = dict.fromkeys(name for each in self._memory for name in each)
        return {
            "outcomes": dict(self._outcomes),
            "requests_per_second": round(self._outcomes.total() / self._busy, 1),
            "own_mib": [round(total, 1) for total in totals],
            "by_process_mib": {name: [each.get(name) for each in self._memory] for name in names},
            "growth": round(totals[-1] / totals[0] - 1, 5),
        }


def _grown(found: dict[str, Any]) -> dict[str, float]:
    """Growth in MiB from the first tenth to the last, by process; only processes in both."""
    ends = {name: (each[0], each[-1]) for name, each in found["by_process_mib"].items()}
    return {name: round(b - a, 2) for name, (a, b) in ends.items() if None not in (a, b)}


async def _served(engine: Engine, requests: Iterator[int], source: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    async with _client(engine) as client:

        async def ask() -> None:
            for _ in requests:
                outcomes[await _outcome(client, *short_request(source))] += 1

        await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return outcomes


def short_request(source: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body: half with the field, half streamed, some with several choices."""
    body: dict[str, Any] = {"max_tokens": source.randint(1, 4)}
    body["stream"] = source.random() < 0.5
    if source.random() < 0.2:
        body["n"] = source.choice([2, 4])
    if source.random() < 0.5:
        body["diversity"] = _field(source, can_be_group="n" in body)
    if source.random() < 0.5:
        return "/v1/chat/completions", chat_body(some_prompt(source), **body)
    return "/v1/completions", {"model": "demo", "prompt": some_prompt(source), **body}


def _field(source: random.Random, can_be_group: bool) -> dict[str, Any]:
    amount = round(source.uniform(0.05, 1), 2)
    field = source.choice(
        [
            {"level": amount},
            {"law": "words", "level": amount},
            {"law": "budget", "target_entropy": 3 * amount},
            {"law": "guard", "min_p": amount / 10},
            {"law": "top_n_sigma", "n_sigma": 2 * amount},
            {"law": "xtc", "xtc_probability": amount, "min_p": 0.02},
            {"law": "dynatemp", "dynatemp_range": amount},
        ]
    )
    if source.random() < 0.3:
        field["dry_multiplier"] = amount
    if can_be_group:
        field["group"] = source.random() < 0.5
    return field


async def _outcome(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """The status, `cut short` for a stream without its end, or the name of a transport error."""
    try:
        answer = await client.post(path, json=body)
    except httpx.HTTPError as error:
        return type(error).__name__
    is_stream = answer.status_code == 200 and body.get("stream")
    if is_stream and not answer.text.rstrip().endswith("data: [DONE]"):
        return "cut short"
    return str(answer.status_code)


def own_mib(process_id: int) -> dict[str, float]:
    """MiB of a process and each of its descendants, by name and number, without file pages.

    File pages are shared with every process that maps the same libraries, so a process's share of
    them changes when others start and end. Pages that the server's processes share with each other
    count proportionally for each.
    """
    leader = psutil.Process(process_id)
    processes = [leader, *leader.children(recursive=True)]
    return {
        f"{process.name()} {number}": round(_kib_without_files(process.pid) / 1024, 2)
        for number, process in enumerate(processes)
    }


def _kib_without_files(process_id: int) -> int:
    lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kib["Pss_Anon"] + kib["Pss_Shmem"]


def disconnects(size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """Streams that their clients leave, then the seconds until vLLM's metrics report none left."""
    engine = servers.get("ours")
    kinds = asyncio.run(_leave_streams(engine, size, source))
    start = time.monotonic()
    left = _unfinished(engine)
    while left and time.monotonic() - start < SECONDS_TO_IDLE:
        time.sleep(0.05)
        left = _unfinished(engine)
    seconds = round(time.monotonic() - start, 2)
    return {
        "streams": size,
        "cut": kinds["cut"],
        "complete": kinds["complete"],
        "left": left,
        "seconds_to_idle": None if left else seconds,
    }


def _unfinished(engine: Engine) -> int:
    kinds = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return round(sum(metric(engine, kind) for kind in kinds))


async def _leave_streams(engine: Engine, size: int, source: random.Random) -> Counter[str]:
    """With more clients than slots, so that some leave while their request waits."""
    requests = iter(range(size))
    kinds: Counter[str] = Counter()
    async with _client(engine) as client:

        async def ask() -> None:
            for _ in requests:
                lines = source.randrange(20)
                # Some leave after a time, maybe before the first token, others after some lines.
                seconds = source.uniform(0, 0.1) if source.random() < 0.3 else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        is_complete = await _read(client, _long_stream(source), lines)
                        kinds["complete"] += is_complete

        await asyncio.gather(*(ask() for _ in range(2 * SLOTS)))
    kinds["cut"] = size - kinds["complete"]
    return kinds


def _long_stream(source: random.Random) -> dict[str, Any]:
    body = chat_body(some_prompt(source), max_tokens=LONG_TOKENS, stream=True, **LIVELY)
    if source.random() < 0.3:
        body["n"] = 2
    if source.random() < 0.5:
        body["diversity"] = _field(source, can_be_group="n" in body)
    return body


async def _read(client: httpx.AsyncClient, body: dict[str, Any], lines: int) -> bool:
    """Read some lines of a stream and leave; returns whether the stream had ended.

    Raises:
        RuntimeError: the request was refused.
    """
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {await answer.aread()!r} to {body}")
        if lines == 0:
            return False
        async for line in answer.aiter_lines():
            lines -= bool(line)
            if line == "data: [DONE]":
                return True
            if lines == 0:
                return False
    return True


def schema(size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """The same requests to both servers, ours at `diversity` 1; counts the valid answers."""
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    bodies = [
        chat_body(
            some_prompt(source),
            response_format=form,
            max_tokens=256,
            seed=source.randrange(2**31),
        )
        for _ in range(size)
    ]
    path = "/v1/chat/completions"
    ours = gather(servers.get("ours"), [(path, {**body, "diversity": 1}) for body in bodies])
    stock = gather(servers.get("stock"), [(path, body) for body in bodies])
    return {
        "requests": size,
        "valid": {"ours": sum(map(is_valid, ours)), "stock": sum(map(is_valid, stock))},
        "statuses": dict(Counter(str(answer.status_code) for answer in (*ours, *stock))),
        "in_force": sum(map(_is_in_force, ours)),
    }


def is_valid(answer: httpx.Response) -> bool:
    """Whether an answer's text is JSON that is valid by the schema."""
    if answer.status_code != 200:
        return False
    text = answer.json()["choices"][0]["message"]["content"]
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _is_in_force(answer: httpx.Response) -> bool:
    return answer.status_code == 200 and None not in answer.json()["diversity"]["choices"]


def overload(size: int, source: random.Random, servers: Servers) -> dict[str, Any]:
    """More clients than slots for `size` seconds, with requests to /health in parallel; on ours,
    then on stock."""
    found = {name: _overload(servers.get(name), size, copy(source)) for name in SERVERS}
    sizes = {"clients": OVERLOAD * SLOTS, "slots": SLOTS}
    return {**sizes, **found["ours"], "stock": found["stock"]}


def _overload(engine: Engine, seconds: float, source: random.Random) -> dict[str, Any]:
    start = time.monotonic()
    with _health_watched(engine) as health:
        outcomes = asyncio.run(_overloaded(engine, seconds, source))
    answered = [seconds for seconds in health if seconds is not None]
    return {
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(outcomes),
        "health": {
            "asked": len(health),
            "failed": len(health) - len(answered),
            "worst_seconds": round(max(answered, default=0.0), 3),
        },
    }


async def _overloaded(engine: Engine, seconds: float, source: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    async with _client(engine) as client:

        async def ask() -> None:
            while time.monotonic() < end:
                body = _long_stream(source) | {"max_tokens": source.randint(8, 64)}
                outcomes[await _outcome(client, "/v1/chat/completions", body)] += 1

        await asyncio.gather(*(ask() for _ in range(OVERLOAD * SLOTS)))
    return outcomes


@contextlib.contextmanager
def _health_watched(engine: Engine) -> Iterator[list[float | None]]:
    """A list that is filled at the end with the seconds of each answer of /health; None if there
    was no answer or it was not a 200."""
    found: list[float | None] = []
    command = [sys.executable, str(HEALTH_WATCH), engine.url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as watcher:
        try:
            yield found
        finally:
            output, _ = watcher.communicate()  # Closes its input, which ends it.
    found += json.loads(output)


@contextlib.asynccontextmanager
async def _client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=engine.url, headers=headers, timeout=PATIENCE, trust_env=False, limits=limits
    ) as client:
        yield client


PHASES: dict[str, Phase] = {
    "fuzz": fuzz,
    "served": served,
    "disconnects": disconnects,
    "schema": schema,
    "overload": overload,
}


if __name__ == "__main__":
    main()
