"""A wrong field of any shape gets a short 400 that names it, from vLLM's own error handling."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from dftserve_vllm import app, request_params
from fastapi import FastAPI
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from dftserve import spec

LONG = "k" * 200_000
MANY = 50_000
LONGEST_ANSWER = 1024


@pytest.fixture(scope="module")
def served() -> FastAPI:
    fastapi_app = FastAPI()
    fastapi_app.state.args = SimpleNamespace(log_error_stack=False)
    to_params = request_params.honour(CompletionRequest.to_sampling_params)

    @fastapi_app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> str:
        return str(to_params(request, 8, {}))

    init_exception_handler(fastapi_app)
    return app.extend(fastapi_app)


def post(fastapi_app: FastAPI, name: str, value: str) -> httpx.Response:
    body = f'{{"model": "demo", "prompt": "x", {json.dumps(name)}: {value}}}'

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(fastapi_app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=body, headers=headers)

    return asyncio.run(run())


def lists(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"level":' * depth + "1" + "}" * depth


KEYS = json.dumps({f"{number}": 0 for number in range(MANY)})
WRONG_VALUES = {
    "lists in lists": lists(800),
    "objects in objects": objects(800),
    "a long key": json.dumps({LONG: 1}),
    "a long key in a known one": json.dumps({"level": {LONG: 1}}),
    "a long text": json.dumps(LONG),
    "a long text that begins as an object": json.dumps("{" + LONG),
    "a text of lists in lists": json.dumps(lists(2000)),
    "a text of objects in objects": json.dumps(objects(300)),
    "a long list": json.dumps([0] * MANY),
    "many keys": KEYS,
    "many keys in a known one": f'{{"level": {KEYS}}}',
    "a key many times": "{" + ",".join(['"level": 2'] * MANY) + "}",
    "a long number": f'{{"level": {"9" * 4000}}}',
}
WRONG_DIVERSITY = {
    "a long law": json.dumps({"law": LONG}),
    "many breakers": json.dumps({"dry_multiplier": 1, "dry_sequence_breakers": ["a"] * MANY}),
    "a long breaker": json.dumps({"dry_multiplier": 1, "dry_sequence_breakers": [LONG]}),
    "breakers in lists": f'{{"dry_multiplier": 1, "dry_sequence_breakers": {lists(800)}}}',
    "a group of many keys": f'{{"level": 0.5, "group": {KEYS}}}',
    "a group in groups": f'{{"level": 0.5, "group": {objects(800)}}}',
    "a long group": json.dumps({"level": 0.5, "group": {"id": LONG, "index": 0, "size": 2}}),
}
CASES = [
    *(("diversity", case, value) for case, value in (WRONG_VALUES | WRONG_DIVERSITY).items()),
    *(("style", case, value) for case, value in WRONG_VALUES.items()),
]


@pytest.mark.parametrize(("name", "case", "value"), CASES, ids=[": ".join(c[:2]) for c in CASES])
def test_a_wrong_field_of_any_shape_gets_a_short_400(served, name, case, value):
    answer = post(served, name, value)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(name)
    assert len(answer.content) <= LONGEST_ANSWER


@pytest.mark.parametrize("case", [case for case, value in WRONG_VALUES.items() if value[0] == '"'])
@pytest.mark.parametrize("name", ["diversity", "style"])
def test_a_wrong_string_in_vllm_xargs_gets_a_short_400(served, name, case):
    answer = post(served, "vllm_xargs", f'{{"{name}": {WRONG_VALUES[case]}}}')
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(f"vllm_xargs.{name}")
    assert len(answer.content) <= LONGEST_ANSWER


@pytest.mark.parametrize("name", ["diversity", "style", "anything"])
def test_json_that_python_cannot_parse_gets_a_400(served, name):
    assert post(served, name, lists(100_000)).status_code == 400


def test_showing_a_value_reads_only_its_beginning():
    keys_read = []

    class Items(dict):
        def __iter__(self):
            for key in super().__iter__():
                keys_read.append(key)
                yield key

        def items(self):
            return ((key, 0) for key in self)

    Items.__name__ = "dict"  # The library distinguishes types by name.
    shown = spec.quoted(Items.fromkeys(map(str, range(MANY)), 0))
    assert shown.startswith("{'0': 0")
    assert len(shown) <= spec.MAX_SHOWN
    assert 0 < len(keys_read) < 20
