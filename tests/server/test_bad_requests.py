"""Wrong values get a 400 that names the parameter, on every endpoint and in streams."""

import json
import random

import pytest

from tests.client import chat_body, gather
from tests.conftest import long

VALUES = [
    True,
    -0.1,
    1.0001,
    10**30,
    "half",
    [],
    {},
    {"level": "0.5"},
    {"level": None},
    {"levle": 0.5},
    {"level": 0.5, "target_entropy": 1.0},
    {"law": "gatd", "level": 0.5},
    {"law": ["gated"]},
    {"law": "budget"},
    {"law": "budget", "target_entropy": 0},
    {"law": "dynatemp", "dynatemp_range": -1},
    {"level": 0.5, "min_p": 0},
    {"level": 0.5, "max_temperature": 0},
    {"law": "guard"},
    {"law": "top_n_sigma", "n_sigma": 0},
    {"law": "xtc", "xtc_probability": 0.5, "xtc_threshold": 0.6},
]
RAW = ["NaN", "Infinity", "-Infinity", '{"level": NaN}', "1e999"]

ENDPOINTS = {
    "/v1/chat/completions": chat_body(max_tokens=4),
    "/v1/completions": {"model": "demo", "prompt": "Once", "max_tokens": 4},
    "/v1/responses": {"model": "demo", "input": "Once", "max_output_tokens": 16},
}


@pytest.mark.parametrize("engine", ["v1", long("v2")], indirect=True)
def test_wrong_values_are_refused_and_good_requests_live_on(engine, record_values):
    cases = [
        (path, body | {"diversity": value, "stream": stream})
        for path, body in ENDPOINTS.items()
        for value in VALUES
        for stream in (False, True)
    ]
    random.Random(0).shuffle(cases)
    good = [("/v1/chat/completions", chat_body(diversity=0.5, max_tokens=24))] * 12
    mixed = cases + good
    random.Random(1).shuffle(mixed)
    for (_, body), answer in zip(mixed, gather(engine, mixed), strict=True):
        if body.get("diversity") == 0.5:
            assert answer.status_code == 200
            assert answer.json()["diversity"]["choices"][0]["tokens"] > 0
            continue
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert error["param"].startswith("diversity"), error
        assert "got" in error["message"], error
        assert "accepted" in error["message"], error
    record_values(refused=len(cases), good_in_flight=len(good))


@pytest.mark.parametrize("text", RAW)
def test_nan_and_infinity_are_refused(v1, text):
    import httpx

    from tests.conftest import KEY

    body = json.dumps(chat_body(max_tokens=4))[:-1] + f', "diversity": {text}}}'
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(
        f"{v1.url}/v1/chat/completions", content=body, headers=headers, trust_env=False
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beam_search_is_refused(v1, path):
    body = ENDPOINTS[path] | {"diversity": 0.5, "use_beam_search": True, "n": 2}
    answer = gather(v1, [(path, body)])[0]
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "diversity"


def test_the_field_and_vllm_xargs_must_agree(v1):
    body = chat_body(diversity=0.5, max_tokens=4)
    different, equal = gather(
        v1,
        [
            ("/v1/chat/completions", body | {"vllm_xargs": {"diversity": 0.6}}),
            ("/v1/chat/completions", body | {"vllm_xargs": {"diversity": "0.5"}}),
        ],
    )
    assert different.status_code == 400
    assert different.json()["error"]["param"] == "diversity"
    assert equal.status_code == 200


def test_a_boolean_in_vllm_xargs_is_1(v1):
    body = chat_body(vllm_xargs={"diversity": True}, max_tokens=4)
    answer = gather(v1, [("/v1/chat/completions", body)])[0]
    assert answer.json()["diversity"]["level"] == 1


def test_a_clients_diversity_id_has_no_effect(v1):
    xargs = {"diversity_id": "mine"}
    bodies = (
        chat_body(vllm_xargs=xargs, max_tokens=4),
        chat_body(vllm_xargs=xargs, diversity=0.5, max_tokens=4),
    )
    off, on = gather(v1, [("/v1/chat/completions", body) for body in bodies])
    assert off.status_code == 200
    assert "diversity" not in off.json()
    assert on.json()["diversity"]["choices"][0]["tokens"] > 0
