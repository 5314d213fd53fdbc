"""Without the field, and with null or 0, every seeded request is answered as by stock vLLM.

Stock is the same environment with DFTSERVE_DISABLE=1, in the long tests one without the plug-in.
"""

import random

import pytest

from tests.client import chat_body, gather, some_prompt
from tests.conftest import long

COUNTS = [("v1", "v1_stock", 200), ("v2", "v2_stock", 16)]
LONG_COUNTS = [long("v1", "v1_bare", 1000), long("v2", "v2_bare", 200)]


@pytest.mark.parametrize(
    ("engine", "stock", "count"), COUNTS + LONG_COUNTS, indirect=["engine", "stock"]
)
def test_seeded_answers_are_stock_byte_for_byte(engine, stock, count, record_values):
    source = random.Random(count)
    bodies = [_seeded(source) for _ in range(count)]
    expected = gather(stock, [("/v1/chat/completions", body) for body in bodies])
    off = [body | source.choice([{}, {"diversity": None}, {"diversity": 0}]) for body in bodies]
    # They share their batches with requests that have the field.
    active = [chat_body(diversity=0.8, max_tokens=body["max_tokens"]) for body in bodies[::2]]
    mixed = [("/v1/chat/completions", body) for body in _interleaved(off, active)]
    answers = [
        answer
        for (_, body), answer in zip(mixed, gather(engine, mixed), strict=True)
        if body.get("diversity") != 0.8
    ]
    same = [_content(a) == _content(b) for a, b in zip(expected, answers, strict=True)]
    record_values(requests=count, identical=sum(same))
    assert all(same), f"{same.count(False)} of {count} differ"


def _seeded(source: random.Random) -> dict:
    extra = source.choice(
        [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}, {"presence_penalty": 0.5}]
    )
    return chat_body(
        some_prompt(source),
        seed=source.randrange(2**31),
        temperature=source.choice([0, 0.7, 1.0, 1.3]),
        max_tokens=source.randrange(8, 24),
        logprobs=True,
        **extra,
    )


def _interleaved(first: list, second: list) -> list:
    """Two of the first, then one of the second, and so on; the first stay in order."""
    mixed = []
    for index, item in enumerate(first):
        mixed.append(item)
        if index % 2 and second:
            mixed.append(second.pop())
    return mixed


def _content(response) -> tuple:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    tokens = [(entry["token"], entry["bytes"]) for entry in choice["logprobs"]["content"]]
    return choice["message"]["content"], choice["finish_reason"], tokens
