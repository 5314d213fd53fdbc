"""/metrics counts exactly what was sent, also with several API servers and engines."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client import chat_body, gather, get
from tests.conftest import Engine, engine_running

pytestmark = pytest.mark.long

REQUESTS = 12
REFUSED = 5
TOKENS = 16
PROMPTS = 5
DEPLOYMENTS = {
    "one of each": (1, 1),
    "2 API servers": (2, 1),
    "2 engines": (1, 2),
    "2 API servers, 2 engines": (2, 2),
}
SAMPLE = re.compile(r"(?P<name>dft:\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
PER_ENGINE = ("dft:tokens_total", "dft:faults_total", "dft:nan_rows_total")


@pytest.fixture(params=DEPLOYMENTS)
def deployed(request, model_folder, tmp_path) -> Iterator[tuple[Engine, int]]:
    """A server, and how many engines it has."""
    api_servers, engines = DEPLOYMENTS[request.param]
    flags = [f"--api-server-count={api_servers}", f"--data-parallel-size={engines}"]
    # Otherwise each engine binds to its own cores, of which there may be too few.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with engine_running("v1", model_folder, tmp_path, *flags, env=env) as engine:
        yield engine, engines


def test_counters_are_what_was_sent(deployed, record_values):
    engine, engines = deployed
    responses = []
    with injected(engine.fault_file.with_name(engine.fault_file.name + ".nan")) as nan_rows:
        responses += answers(engine)
    with injected(engine.fault_file) as faults:
        responses += answers(engine)
    responses += answers(engine)
    several = completion_of_several_prompts(engine)
    wrong = chat_body(diversity=7, max_tokens=TOKENS)
    refused = gather(engine, [("/v1/chat/completions", wrong)] * REFUSED)
    assert {answer.status_code for answer in refused} == {400}

    choices = [choice for each in [*responses, several] for choice in each["diversity"]["choices"]]
    expected = {
        "dft:requests_total": len(responses) + 1,
        "dft:requests_refused_total": REFUSED,
        "dft:tokens_total": sum(choice["tokens"] for choice in choices if choice is not None),
        "dft:nan_rows_total": nan_rows(),
        "dft:faults_total": faults(),
        "dft:statistics_unavailable_total": choices.count(None),
    }
    sums, labels = counters_of(engine)
    record_values(expected=expected, counted={name: sums[name] for name in expected})
    assert {name: sums[name] for name in expected} == expected
    # The last twelve had no fault: each has statistics of all its tokens.
    for each in responses[-REQUESTS:]:
        tokens = [choice and choice["tokens"] for choice in each["diversity"]["choices"]]
        assert tokens == [TOKENS]
    assert nan_rows() == REQUESTS * TOKENS
    assert {label["model_name"] for name in sums for label in labels[name]} == {"demo"}
    for name in PER_ENGINE:
        assert {label["engine"] for label in labels[name]} == set(map(str, range(engines))), name


@contextmanager
def injected(trigger: Path):
    """tests/shim injects faults while the file exists; yields a function that counts them."""
    count = trigger.with_name(f"{trigger.name}.count")
    trigger.touch()
    try:
        yield lambda: count.stat().st_size if count.exists() else 0
    finally:
        trigger.unlink()


def answers(engine: Engine) -> list[dict]:
    body = chat_body(diversity=0.5, max_tokens=TOKENS, ignore_eos=True)
    got = gather(engine, [("/v1/chat/completions", body)] * REQUESTS)
    assert {answer.status_code for answer in got} == {200}, [answer.text for answer in got]
    return [answer.json() for answer in got]


def completion_of_several_prompts(engine: Engine) -> dict:
    prompts = [f"Number {number}" for number in range(PROMPTS)]
    body = {"model": "demo", "prompt": prompts, "max_tokens": TOKENS, "diversity": 0.5}
    (answer,) = gather(engine, [("/v1/completions", body | {"ignore_eos": True})])
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert len(content["diversity"]["choices"]) == PROMPTS
    return content


def counters_of(engine: Engine) -> tuple[Counter[str], dict[str, list[dict[str, str]]]]:
    """The sum over the samples of each metric of ours in /metrics, and their labels."""
    sums: Counter[str] = Counter()
    labels: dict[str, list[dict[str, str]]] = {}
    for line in get(engine, "/metrics").text.splitlines():
        if (sample := SAMPLE.fullmatch(line)) is None:
            continue
        sums[sample["name"]] += float(sample["value"])
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', sample["labels"] or ""))
        labels.setdefault(sample["name"], []).append(pairs)
    return sums, labels
