"""A fault in the transform: the engine survives, the rows are unchanged, the count is exact."""

import random

import pytest

from tests.client import chat_body, gather, get, metric
from tests.conftest import long


@pytest.mark.parametrize(
    ("engine", "faults"), [("v1", 100), long("v1", 1000), long("v2", 1000)], indirect=["engine"]
)
def test_faults_are_survived_and_counted(engine, faults, record_values):
    count_file = engine.fault_file.with_name(engine.fault_file.name + ".count")
    count_file.unlink(missing_ok=True)
    before = metric(engine, "dft:faults_total")
    plain = [_plain(seed) for seed in range(16)]
    expected = [_text(answer) for answer in gather(engine, plain)]
    engine.fault_file.touch()
    injected = 0
    try:
        while injected < faults:
            active = [
                (path, body | {"diversity": {"level": random.Random(seed).random(), "trace": True}})
                for seed, (path, body) in enumerate(plain)
            ]
            answers = gather(engine, active)
            # Unchanged rows give the texts of stock sampling for the seed.
            assert [_text(answer) for answer in answers] == expected
            # And tokens of unchanged rows have no statistics.
            assert {value for answer in answers for value in _traced(answer)} <= {None}
            injected = count_file.stat().st_size
    finally:
        engine.fault_file.unlink()
    assert None not in _traced(gather(engine, active)[0])
    record_values(injected=injected, counted=metric(engine, "dft:faults_total") - before)
    assert metric(engine, "dft:faults_total") - before == injected
    assert get(engine, "/v1/dft/capabilities").json()["faults"] >= injected
    assert engine.log.read_text(errors="replace").count("an injected fault") <= 2


def _plain(seed: int) -> tuple[str, dict]:
    neutral = {"top_p": 1.0, "top_k": 0, "temperature": 0.9}
    return "/v1/chat/completions", chat_body(seed=seed, max_tokens=8, **neutral)


def _traced(answer) -> list[float | None]:
    (choice,) = answer.json()["diversity"]["choices"]
    return [] if choice is None else choice["trace"]["temperature"]


def _text(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]
