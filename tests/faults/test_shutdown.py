"""SIGTERM with requests in flight: as many answers as from stock vLLM, and an end as early.

A server drains (`--shutdown-timeout` above 0: requests in flight are completed) or aborts. Then an
answer may lack statistics, but no answer that stock gives may be lost. With several API servers,
vLLM 0.32 does not drain: each disconnects from the engine at once, and stock loses requests too.
"""

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FLAGS, KEY, engine_running
from tests.faults.forked_servers import ForkedServers
from tests.faults.shutdown_driver import REQUESTS, Load, Outcome, shut_down

ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
DRAIN = "--shutdown-timeout=30"
ABORT = "--shutdown-timeout=0"
SLACK = 2.0
"""Seconds that a shutdown may take longer than stock's."""
TOKENS = 400
"""Output tokens of a request: they take seconds on a CPU, so that all outlast the signal."""
PAIRS = 3
REPETITIONS = 50


@dataclasses.dataclass(frozen=True)
class Case:
    drains: bool = True
    api_servers: int = 1
    field: bool = True
    stream: bool = False
    lora: bool = False

    def __str__(self) -> str:
        words = [
            "drain" if self.drains else "abort",
            f"{self.api_servers} API servers" if self.api_servers > 1 else "1 API server",
            "field" if self.field else "no field",
            *(["streams"] if self.stream else []),
            *(["LoRA"] if self.lora else []),
        ]
        return ", ".join(words)

    def flags(self, adapter: Path) -> tuple[str, ...]:
        lora = ("--enable-lora", "--max-lora-rank=8", "--lora-modules", f"adapter={adapter}")
        return (
            *FLAGS,
            DRAIN if self.drains else ABORT,
            f"--api-server-count={self.api_servers}",
            *(lora if self.lora else ()),
        )

    def load(self, tokens: int) -> Load:
        model = "adapter" if self.lora else "demo"
        return Load(model, field=self.field, stream=self.stream, tokens=tokens)


CASES = [
    Case(),
    Case(field=False),
    Case(stream=True),
    Case(lora=True),
    Case(stream=True, lora=True),
    Case(api_servers=2),
    Case(api_servers=2, field=False),
    Case(api_servers=2, stream=True),
    Case(drains=False),
    Case(drains=False, field=False),
    Case(drains=False, stream=True),
    Case(drains=False, api_servers=2),
]


@pytest.fixture(scope="module")
def ours() -> Iterator[ForkedServers]:
    servers = ForkedServers(ENVIRONMENT)
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def stock() -> Iterator[ForkedServers]:
    servers = ForkedServers({**ENVIRONMENT, "DFTSERVE_DISABLE": "1"})
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def adapter(model_folder, tmp_path_factory) -> Path:
    """A random LoRA adapter for the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(
        folder
    )
    return folder


def shutdown(
    servers: ForkedServers, case: Case, model: Path, adapter: Path, log: Path, tokens: int = TOKENS
) -> Outcome:
    with servers.running(model, *case.flags(adapter), log=log) as server:
        return asyncio.run(shut_down(server.url, KEY, server.process_id, case.load(tokens)))


def test_a_drain_answers_every_request(ours, model_folder, tmp_path):
    outcome = shutdown(ours, Case(), model_folder, tmp_path, tmp_path / "log")
    assert outcome.complete == REQUESTS, outcome
    assert outcome.seconds is not None, f"the server hangs: {outcome}"


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_shutdown_is_stock(ours, stock, model_folder, adapter, tmp_path, case, record_values):
    """Every pair has as many answers as stock. One pair within the time suffices, as the machine is
    shared."""
    pairs = []
    for pair in range(PAIRS):
        expected, got = (
            shutdown(servers, case, model_folder, adapter, tmp_path / f"{name}{pair}.log")
            for name, servers in (("stock", stock), ("ours", ours))
        )
        pairs.append((expected, got))
        assert expected.seconds is not None, f"stock vLLM itself hangs: {expected}"
        assert got.complete >= expected.complete, (expected, got)
        assert got.seconds is not None, f"the server hangs: {got}"
        if got.seconds <= expected.seconds + SLACK:
            break
    else:
        pytest.fail(f"more than {SLACK} s longer than stock each time: {pairs}")
    record_values(
        stock=dataclasses.asdict(expected), ours=dataclasses.asdict(got), pairs=len(pairs)
    )


@pytest.mark.long
def test_drains_never_hang(ours, model_folder, tmp_path, record_values):
    cases = itertools.islice(itertools.cycle([Case(), Case(stream=True)]), REPETITIONS)
    outcomes = [
        shutdown(ours, case, model_folder, tmp_path, tmp_path / "log", tokens=128) for case in cases
    ]
    hung = sum(outcome.seconds is None for outcome in outcomes)
    answered = sum(outcome.complete for outcome in outcomes)
    record_values(drains=REPETITIONS, hung=hung, requests=REPETITIONS * REQUESTS, answered=answered)
    assert hung == 0
    assert answered == REPETITIONS * REQUESTS


@pytest.mark.long
def test_vllm_serve_itself_drains(model_folder, tmp_path):
    """Not forked: as an operator starts it."""
    with engine_running("v1", model_folder, tmp_path, DRAIN) as engine:
        outcome = asyncio.run(shut_down(engine.url, KEY, engine.pid, Case().load(TOKENS)))
    assert (outcome.complete, outcome.seconds is None) == (REQUESTS, False), outcome
