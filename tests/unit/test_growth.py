"""Long-lived state does not grow with the number of served requests: there are as many objects
tracked by Python's garbage collector after 3N requests as after N, and fewer additional allocated
blocks than requests."""

import asyncio
import gc
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from dftserve_vllm import preempted, request_context, statistics, step_report, worker
from dftserve_vllm.engine_core import forward
from dftserve_vllm.extra_args import IDENTITY, of_choice
from dftserve_vllm.processor import DiversityProcessor
from dftserve_vllm.request_context import PromptContext
from dftserve_vllm.response_middleware import ResponseMiddleware
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.logits_processor.interface import BatchUpdate

from dftserve import spec
from tests.vllm_config import config

N = 120
V = 50
FIELDS = (
    0.5,
    {"law": "budget", "target_entropy": 1.5},
    {"law": "guard", "min_p": 0.05},
    {"law": "top_n_sigma", "n_sigma": 1.0},
    {"law": "xtc", "xtc_probability": 0.5, "min_p": 0.02},
    {"law": "dynatemp", "dynatemp_range": 0.4},
    {"level": 0.3, "dry_multiplier": 0.8, "dry_sequence_breakers": []},
    {"level": 0.3, "trace": True},
    {"level": 0.5, "group": True},
)
"""The requests take these in turn."""


OTHERS = 8
"""Objects of a type that the rest of this process may create meanwhile: fewer than one for every
tenth request, 2N / 10."""


def growth_of(serve: Callable[[int], None]) -> tuple[dict[str, int], int]:
    """What there is more of after 3N requests than after N: tracked objects by type, if more than
    `OTHERS`, and allocated blocks of memory."""
    serve(N // 2)
    objects = _objects()  # Counting itself creates some objects once.
    serve(N - N // 2)
    objects = _objects()
    pieces = sys.getallocatedblocks()
    serve(2 * N)
    gc.collect()
    pieces = sys.getallocatedblocks() - pieces
    more = _objects() - objects
    return {name: count for name, count in more.items() if count > OTHERS}, pieces


def _objects() -> Counter[str]:
    gc.collect()
    return Counter(type(each).__qualname__ for each in gc.get_objects())


def is_less_than_one_a_request(pieces: int) -> bool:
    return pieces < N


class Worker:
    """A V1 worker of four slots and its engine core. Every tenth request is preempted and
    resumed."""

    def __init__(self) -> None:
        self._config = config(parallel_config=SimpleNamespace(data_parallel_index=0))
        self._processor = DiversityProcessor(self._config, torch.device("cpu"), False)
        self._scheduler = SimpleNamespace(vllm_config=self._config)
        self._numbers = itertools.count()
        self.payloads = 0

    def serve(self, requests: int) -> None:
        for _ in range(requests):
            number = next(self._numbers)
            outputs: list[list[int]] = [[], []]
            self._join(number, outputs)
            self._step(outputs, ends=False)
            if number % 10 == 0:
                self._leave()
                self._join(number, outputs)
            self._step(outputs, ends=True)
            self._leave()

    def _join(self, number: int, outputs: list[list[int]]) -> None:
        diversity = FIELDS[number % len(FIELDS)]
        carried = {"diversity": diversity, "diversity_id": str(number)}
        whole = SamplingParams(temperature=1.0, n=len(outputs), seed=number, extra_args=carried)
        parent = SimpleNamespace(sampling_params=whole, request_id=str(number))
        added = []
        for index, output in enumerate(outputs):
            own = of_choice(whole, index, parent)
            own.n = 1
            added.append((index, own, [1, 2, 3], output))
        self._processor.update_state(BatchUpdate(len(added), removed=[], added=added, moved=[]))

    def _leave(self) -> None:
        self._processor.update_state(BatchUpdate(0, removed=[0, 1], added=[], moved=[]))

    def _step(self, outputs: list[list[int]], *, ends: bool) -> None:
        self._processor.apply(torch.randn(len(outputs), V))
        for output in outputs:
            output.append(len(output))
        names = [str(index) for index in range(len(outputs))]
        made = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)})
        worker.with_report(SimpleNamespace(vllm_config=self._config), made)
        reason = "length" if ends else None
        each = [
            SimpleNamespace(request_id=name, finish_reason=reason, kv_transfer_params=None)
            for name in names
        ]
        forward(self._scheduler, made, {0: SimpleNamespace(outputs=each)})
        self.payloads += sum(step_report.take(output) is not None for output in each)

    @property
    def faults(self) -> int:
        return self._processor.state.faults


def test_a_worker_and_its_engine_core_do_not_grow(monkeypatch):
    """The state kept for preempted requests is bounded; the bound is reached here."""
    monkeypatch.setattr(preempted, "MOST", N // 10)
    served = Worker()
    objects, pieces = growth_of(served.serve)
    assert served.faults == 0
    assert served.payloads >= 6 * N
    assert objects == {}
    assert is_less_than_one_a_request(pieces)


def test_states_of_preempted_requests_are_not_tracked_by_the_collector():
    """A worker keeps thousands of them, mostly for requests that have ended."""
    assert 3 * N < preempted.MOST
    objects, _ = growth_of(Worker().serve)
    assert objects == {}


class ApiProcess:
    """The middleware around an app that accepts the field, and an engine that answers at once."""

    def __init__(self) -> None:
        self._app = ResponseMiddleware(self._answer)
        self._numbers = itertools.count()
        self._processor = SimpleNamespace(request_states={})
        self.answers = 0

    def serve(self, requests: int) -> None:
        asyncio.run(self._serve(requests))

    async def _serve(self, requests: int) -> None:
        for _ in range(requests):
            headers = [(b"authorization", b"Bearer a")]
            scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
            # In its own task, as in a web server: its context variables end with it.
            one = self._app({**scope, "headers": headers}, None, self._send)
            await asyncio.create_task(one)  # type: ignore[arg-type]

    async def _answer(self, scope, receive, send) -> None:
        number = next(self._numbers)
        prompt = PromptContext(spec.parse(FIELDS[number % len(FIELDS)]), count=1)
        context = request_context.current.get()
        assert context is not None
        context.prompts.append(prompt)
        self._run_on_engine(str(number), prompt)
        length = (b"content-type", b"application/json")
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": b'{"id": "a"}'})

    def _run_on_engine(self, name: str, prompt: PromptContext) -> None:
        params = SamplingParams(extra_args={**prompt.carried(), IDENTITY: prompt.identity})
        self._processor.request_states[name] = SimpleNamespace()
        statistics.note(self._processor, SimpleNamespace(request_id=name, sampling_params=params))
        output = SimpleNamespace(
            request_id=name, new_token_ids=[1], finish_reason="length", kv_transfer_params=None
        )
        step_report.put(output, {"row": [0.0] * 10 + [1.0] * 9, "engine": 0})
        ended = statistics.collect(self._processor, [output])
        del self._processor.request_states[name]
        statistics.count_ended(self._processor, ended)

    async def _send(self, message) -> None:
        if message["type"] == "http.response.body":
            (choice,) = json.loads(message["body"])["diversity"]["choices"]
            self.answers += choice["tokens"] == 1


def test_an_api_process_does_not_grow():
    process = ApiProcess()
    objects, pieces = growth_of(process.serve)
    assert process.answers == 3 * N
    assert objects == {}
    assert is_less_than_one_a_request(pieces)


def test_an_api_process_leaves_no_cycles_of_our_objects():
    """Otherwise each request and its answer would stay in memory until the collector runs."""
    process = ApiProcess()
    process.serve(1)
    gc.collect()
    before = _ours()
    gc.disable()
    try:
        process.serve(N)
        assert dict(_ours() - before) == {}
    finally:
        gc.enable()


def _ours() -> Counter[str]:
    return Counter(
        type(each).__qualname__
        for each in gc.get_objects()
        if str(type(each).__module__).startswith("dftserve")
    )


def test_growth_is_detected():
    kept: list[object] = []
    numbers = itertools.count(10**6)
    objects, _ = growth_of(lambda requests: kept.extend([] for _ in range(requests)))
    assert objects.keys() == {"list"}
    assert abs(objects["list"] - 2 * N) <= OTHERS
    _, pieces = growth_of(lambda requests: kept.extend(next(numbers) for _ in range(requests)))
    assert not is_less_than_one_a_request(pieces)


@pytest.fixture(autouse=True)
def collected_first():
    """Garbage of earlier tests must not hide growth."""
    gc.collect()
