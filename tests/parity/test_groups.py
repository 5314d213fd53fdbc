"""The texts of a group are those that their codes select by the law: over HTTP, against fp64."""

import random

import numpy as np
import pytest

from dftserve.sampling.draws import draw_key
from dftserve.stories.grammar import PROMPTS
from tests.client import chat_body, gather, metric
from tests.conftest import Engine, long
from tests.group_reference import cut_reference, drawn_reference, first_code_reference
from tests.reference import reference
from tests.served_distribution import (
    complete,
    plain,
    sampled_tokens,
    served_log_ps,
    stop_ids,
    vocabulary_of,
)

SIZE, TOKENS = 16, 6
NEVER = -9999.0
"""vLLM's value for a logprob of -inf."""
NEAR = 1e-3
"""A code so near the end of an interval may fall into the next one: float32 rounds."""


@pytest.mark.parametrize(
    ("engine", "prompts"),
    [("v1", 3), ("v2", 2), long("v1", 20), long("v2", 20)],
    indirect=["engine"],
)
def test_texts_of_a_group_are_those_of_their_codes(engine, prompts, record_values):
    record_values(checked=check(engine, prompts))


def check(engine: Engine, prompts: int) -> int:
    """Check groups with and without cuts of the request, as n choices or as n requests; returns the
    number of checked tokens."""
    source, vocabulary = random.Random(21), vocabulary_of(engine)
    checked, first_steps = 0, set()
    for number, prompt in enumerate(source.sample(list(PROMPTS), prompts)):
        level, temperature = source.uniform(0.3, 1.0), source.uniform(0.8, 1.5)
        cuts = {"top_k": 5, "top_p": 0.9} if number % 2 else {"top_k": 0, "top_p": 1.0}
        # Repeated, so that n-gram drafts find something.
        body = {"prompt": f"{prompt}\n{prompt}\n", "temperature": temperature} | cuts
        body |= {"max_tokens": TOKENS}
        if number % 3 == 2:
            groups = [{"id": f"g{number}", "index": i, "size": SIZE} for i in range(SIZE)]
            requests = [body | {"diversity": {"level": level, "group": group}} for group in groups]
            choices = [_tokens_by_choice(each)[0] for each in complete(engine, requests, 1)]
            name = f"g{number}"
        else:
            requests = body | {"diversity": {"level": level, "group": True}, "n": SIZE}
            choices = _tokens_by_choice(complete(engine, [requests | {"seed": number}], 1)[0])
            name = f"{draw_key('group', 'seed', number):012x}"
        for index, tokens in enumerate(choices):
            code, used = first_code_reference(name, index, SIZE), 0.0
            for step, token in enumerate(tokens):
                before = [body["prompt"], tokens[:step]]
                law = reference(
                    _logits(engine, before, vocabulary),
                    temperature=temperature,
                    level=level,
                    stop_ids=stop_ids(engine),
                )
                p_V = cut_reference(np.exp(law.log_p_V), **cuts)
                expected, inside = drawn_reference(p_V, code)
                if used >= np.log2(SIZE) or not NEAR < inside < 1 - NEAR:
                    break
                assert token == expected, (number, index, step)
                used -= np.log2(p_V[token])
                code = inside
                checked += 1
                if step == 0:
                    first_steps.add(token)
    assert checked > SIZE * prompts
    assert len(first_steps) > 1
    return checked


def _tokens_by_choice(answer) -> list[list[int]]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["diversity"]["group"]
    return [
        sampled_tokens(each) for each in sorted(body["choices"], key=lambda each: each["index"])
    ]


_cache: dict[tuple, np.ndarray] = {}


def _logits(engine, before: list, vocabulary: int) -> np.ndarray:
    """Logits after a prompt and these tokens, cached as texts of a group share them."""
    prompt, tokens = before
    key = engine.name, prompt, tuple(tokens)
    if key not in _cache:
        ids = [*_tokens(engine, prompt), *tokens]
        _cache[key] = served_log_ps(engine, [plain(ids)], vocabulary)[0]
    return _cache[key]


def _tokens(engine, text: str) -> list[int]:
    body = {"model": "demo", "prompt": text}
    return gather(engine, [("/tokenize", body)])[0].json()["tokens"]


def test_preempted_texts_of_a_group_keep_their_codes(v1, record_values):
    """Sixteen long texts do not fit into twenty blocks. So near temperature 0, a text uses almost
    none of its code's ten bits, so the code determines every token, and no other has a probability.
    If a code were lost, others would have one, as in the text without a group."""
    sharp = {"temperature": 0.02, "max_tokens": 380, "ignore_eos": True}
    sharp |= {"logprobs": True, "top_logprobs": 2}
    groups = [{"id": "long", "index": 64 * i, "size": 1024} for i in range(16)]
    requests = [chat_body(diversity={"level": 0, "group": group}, **sharp) for group in groups]
    alone = chat_body(diversity={"law": "guard", "min_p": 0.01}, **sharp)
    before = metric(v1, "vllm:num_preemptions_total")
    faults = metric(v1, "dft:faults_total")
    answers = gather(
        v1,
        [("/v1/chat/completions", body) for body in (*requests, alone)],
        at_once=len(requests) + 1,
    )
    preemptions = metric(v1, "vllm:num_preemptions_total") - before
    *of_group, of_alone = map(_tokens_with_alternatives, answers)
    record_values(preemptions=preemptions, open_tokens_without_a_group=of_alone)
    assert preemptions > 0
    assert metric(v1, "dft:faults_total") == faults
    assert of_group == [0] * len(requests)
    assert of_alone > 20


def _tokens_with_alternatives(answer) -> int:
    """The number of a text's tokens for which another could have been drawn."""
    (choice,) = answer.json()["choices"]
    rows = [
        [each["logprob"] for each in token["top_logprobs"]]
        for token in choice["logprobs"]["content"]
    ]
    assert len(rows) == 380
    return sum(min(row) > NEVER for row in rows)


@pytest.mark.parametrize(
    ("group", "fields", "parameter"),
    [
        (True, {}, "diversity.group"),
        ({"id": "a", "index": 4, "size": 4}, {}, "diversity.group.index"),
        ({"id": "a", "index": 0, "size": 4}, {"n": 2}, "diversity.group"),
        ({"id": "a", "index": 0, "size": 4}, {"temperature": 0}, "temperature"),
    ],
)
def test_a_wrong_group_is_a_400(v1, group, fields, parameter):
    body = chat_body(diversity={"level": 0.5, "group": group}, max_tokens=4, **fields)
    for stream in (False, True):
        answer = gather(v1, [("/v1/chat/completions", body | {"stream": stream})])[0]
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == parameter
