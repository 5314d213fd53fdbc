"""A request's text does not depend on other requests in its batch, nor on preemption."""

import random

import pytest

from tests.client import LIVELY, chat_body, gather, metric, some_prompt
from tests.conftest import long


@pytest.mark.parametrize(
    ("engine", "seeds"), [("v1", 32), long("v1", 200), long("v2", 32)], indirect=["engine"]
)
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(engine, seeds, record_values):
    source = random.Random(11)
    bodies = [
        chat_body(
            some_prompt(source),
            seed=seed,
            diversity=source.choice([0.3, 0.7, {"law": "budget", "target_entropy": 1.5}]),
            max_tokens=24,
        )
        for seed in range(seeds)
    ]
    requests = [("/v1/chat/completions", body) for body in bodies]
    together = [_text(answer) for answer in gather(engine, requests, at_once=16)]
    alone = [_text(answer) for answer in gather(engine, requests, at_once=1)]
    record_values(seeds=seeds, identical=sum(a == b for a, b in zip(alone, together, strict=True)))
    assert alone == together


def test_preempted_requests_complete_and_count_each_token_once(v1, record_values):
    """Sixteen long texts at a time do not fit into twenty blocks, so the engine must preempt."""
    before = metric(v1, "vllm:num_preemptions_total")
    free = chat_body(diversity={"level": 0.01}, max_tokens=380, **LIVELY)
    alone = gather(v1, [("/v1/chat/completions", free)])[0].json()
    target = alone["diversity"]["choices"][0]["mean_entropy_after"]
    # One request, so that its choices run together also on a busy machine.
    body = free | {"diversity": {"law": "budget", "target_entropy": target}, "n": 16}
    answers = gather(v1, [("/v1/chat/completions", body)] * 2, at_once=2)
    preemptions = metric(v1, "vllm:num_preemptions_total") - before
    record_values(preemptions=preemptions)
    assert preemptions > 0, "nothing was preempted, so the test shows nothing"
    for answer in answers:
        content = answer.json()
        assert content["usage"]["completion_tokens"] == 16 * 380
        for choice in content["diversity"]["choices"]:
            assert choice["tokens"] == 380
            assert choice["mean_entropy_after"] == pytest.approx(target, rel=0.25)


def _text(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]
