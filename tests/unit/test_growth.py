"""What lives as long as a process does not grow with the requests that it has served: of objects
that Python's garbage collector visits there are as many after N requests as after 3N, and of all
memory that Python gives out less than a piece a request more."""

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
"""Of a request each, in turn; the last is of two choices."""


OTHERS = 8
"""Objects of a type that the rest of this process may have made meanwhile: fewer than what every
tenth request would leave, 2N / 10."""


def grown(serve: Callable[[int], None]) -> tuple[dict[str, int], int]:
    """What there is more of after 3N requests than after N: of collected objects by type, where
    more than `OTHERS`, and of Python's pieces of memory."""
    serve(N // 2)
    objects = _objects()  # Of what is made once, some is made as it is counted.
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
    """A V1 worker of four slots, and the engine core behind it. Every tenth request is preempted
    on its way, and comes back."""

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
        asked = FIELDS[number % len(FIELDS)]
        carried = {"diversity": asked, "diversity_id": str(number)}
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
        return self._processor.stats.faults


def test_a_worker_and_its_engine_core(monkeypatch):
    """What is kept for preempted requests is bounded, and its bound is reached here."""
    monkeypatch.setattr(preempted, "MOST", N // 10)
    served = Worker()
    objects, pieces = grown(served.serve)
    assert served.faults == 0
    assert served.payloads >= 6 * N
    assert objects == {}
    assert is_less_than_one_a_request(pieces)


def test_what_is_kept_for_requests_that_may_come_back_is_no_object_that_is_collected():
    """Thousands of them are kept in a worker, each of a request that has mostly ended."""
    assert 3 * N < preempted.MOST
    objects, _ = grown(Worker().serve)
    assert objects == {}


class ApiProcess:
    """The middleware around an app that takes the field, and an engine that answers at once."""

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
            # A task of its own, as a web server has it: what is set in its context ends with it.
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


def test_an_api_process():
    process = ApiProcess()
    objects, pieces = grown(process.serve)
    assert process.answers == 3 * N
    assert objects == {}
    assert is_less_than_one_a_request(pieces)


def test_an_api_process_leaves_nothing_of_ours_to_the_collector():
    """Else each request, its answer among it, stays until the collector comes."""
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


def test_what_does_grow_is_seen():
    kept: list[object] = []
    numbers = itertools.count(10**6)
    objects, _ = grown(lambda requests: kept.extend([] for _ in range(requests)))
    assert objects == {"list": 2 * N}
    _, pieces = grown(lambda requests: kept.extend(next(numbers) for _ in range(requests)))
    assert not is_less_than_one_a_request(pieces)


@pytest.fixture(autouse=True)
def collected_first():
    """What earlier tests left behind is not counted as less."""
    gc.collect()
