"""The texts of a group are those that their codes find in the law: over HTTP, against fp64."""

import random

import numpy as np
import pytest

from dftserve.sampling.draws import draw_key
from dftserve.stories.grammar import PROMPTS
from tests.client import chat_body, gather, metric
from tests.conftest import Engine, long
from tests.group_reference import cut_reference, drawn_reference, first_code_reference
from tests.parity.test_exactness import _plain, _read, _reading, _sampled, _stops, _vocabulary
from tests.reference import reference

SIZE, TOKENS = 16, 6
NEVER = -9999.0
"""As vLLM writes a logprob of -inf."""
NEAR = 1e-3
"""A code that near to the end of an interval may fall into the next one: float32 rounds."""


@pytest.mark.parametrize(
    ("engine", "prompts"),
    [("v1", 3), ("v2", 2), long("v1", 20), long("v2", 20)],
    indirect=["engine"],
)
def test_texts_are_those_of_their_codes(engine, prompts, figure):
    figure(checked=check(engine, prompts))


def check(engine: Engine, prompts: int) -> int:
    """With cuts of the request's own and without; n choices, and as many requests. Returns how many
    tokens were found to be right."""
    source, vocabulary = random.Random(21), _vocabulary(engine)
    checked, first_steps = 0, set()
    for number, prompt in enumerate(source.sample(list(PROMPTS), prompts)):
        level, temperature = source.uniform(0.3, 1.0), source.uniform(0.8, 1.5)
        cuts = {"top_k": 5, "top_p": 0.9} if number % 2 else {"top_k": 0, "top_p": 1.0}
        # Said twice, so that drafts of n-grams find something.
        body = {"prompt": f"{prompt}\n{prompt}\n", "temperature": temperature} | cuts
        body |= {"max_tokens": TOKENS}
        if number % 3 == 2:
            places = [{"id": f"g{number}", "index": i, "size": SIZE} for i in range(SIZE)]
            asked = [body | {"diversity": {"level": level, "group": place}} for place in places]
            choices = [_choices(each)[0] for each in _reading(engine, asked, 1)]
            name = f"g{number}"
        else:
            asked = body | {"diversity": {"level": level, "group": True}, "n": SIZE}
            choices = _choices(_reading(engine, [asked | {"seed": number}], 1)[0])
            name = f"{draw_key('group', 'seed', number):012x}"
        for index, tokens in enumerate(choices):
            code, used = first_code_reference(name, index, SIZE), 0.0
            for step, token in enumerate(tokens):
                before = [body["prompt"], tokens[:step]]
                law = reference(
                    _logits(engine, before, vocabulary),
                    temperature=temperature,
                    level=level,
                    stop_ids=_stops(engine, {"shaping": {}}),
                )
                p_V = cut_reference(np.exp(law.log_p_V), **cuts)
                wanted, inside = drawn_reference(p_V, code)
                if used >= np.log2(SIZE) or not NEAR < inside < 1 - NEAR:
                    break
                assert token == wanted, (number, index, step)
                used -= np.log2(p_V[token])
                code = inside
                checked += 1
                if step == 0:
                    first_steps.add(token)
    assert checked > SIZE * prompts
    assert len(first_steps) > 1
    return checked


def _choices(answer) -> list[list[int]]:
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said["diversity"]["group"]
    return [_sampled(each) for each in sorted(said["choices"], key=lambda each: each["index"])]


_seen: dict[tuple, np.ndarray] = {}


def _logits(engine, before: list, vocabulary: int) -> np.ndarray:
    """Behind a prompt and these tokens, which texts of a group share."""
    prompt, tokens = before
    key = engine.name, prompt, tuple(tokens)
    if key not in _seen:
        ids = [*_tokens(engine, prompt), *tokens]
        _seen[key] = _read(engine, [_plain({"prompt": ids, "shaping": {}})], vocabulary)[0]
    return _seen[key]


def _tokens(engine, text: str) -> list[int]:
    body = {"model": "demo", "prompt": text}
    return gather(engine, [("/tokenize", body)])[0].json()["tokens"]


def test_preempted_texts_of_a_group_stay_drawn(v1, figure):
    """Sixteen long texts in twenty blocks. So near to temperature 0 a text takes next to none of
    its code's ten bits: each of its tokens is the code's, and stands alone in its row. Where a code
    was lost, others show beside it, as in the text without a group."""
    sharp = {"temperature": 0.02, "max_tokens": 380, "ignore_eos": True}
    sharp |= {"logprobs": True, "top_logprobs": 2}
    places = [{"id": "long", "index": 64 * i, "size": 1024} for i in range(16)]
    asked = [chat_body(diversity={"level": 0, "group": place}, **sharp) for place in places]
    alone = chat_body(diversity={"law": "guard", "min_p": 0.01}, **sharp)
    before = metric(v1, "vllm:num_preemptions_total")
    faults = metric(v1, "dft:faults_total")
    answers = gather(
        v1, [("/v1/chat/completions", body) for body in (*asked, alone)], at_once=len(asked) + 1
    )
    preemptions = metric(v1, "vllm:num_preemptions_total") - before
    *drawn, others = map(_not_alone, answers)
    figure(preemptions=preemptions, open_tokens_without_a_group=others)
    assert preemptions > 0
    assert metric(v1, "dft:faults_total") == faults
    assert drawn == [0] * len(asked)
    assert others > 20


def _not_alone(answer) -> int:
    """How many of a text's tokens had another beside them that could have been drawn."""
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
