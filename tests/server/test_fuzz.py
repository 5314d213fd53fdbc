"""Random requests: a wrong field gets a short 400 that names it; stock answers are unchanged."""

import json
import random
from typing import Any

import httpx
import pytest

from dftserve import spec
from tests.client import chat_body, gather, gather_bytes, get, post
from tests.fuzz_bodies import BASES, CANARY, MAX_ANSWER_BYTES, Asked, asked, complaint
from tests.vllm_app import routes_with_fields

BODIES = 500
BODIES_BY_SCHEMA = 40
"""Bodies for each route; they take longer to draw."""
VALUES = 40
"""Values for each field on each route, drawn from our OpenAPI document."""
CHAT = "/v1/chat/completions"
BODY_BY_PATH = BASES | {f"{CHAT}/batch": BASES[CHAT] | {"messages": [BASES[CHAT]["messages"]]}}
PARSE = {"diversity": spec.parse, "style": spec.parse_style}


def test_random_bodies_are_answered_as_by_stock_or_refused(v1, v1_stock, record_values):
    source = random.Random(0)
    requested = [asked(source, number) for number in range(BODIES)]
    requests = [(one.path, one.body) for one in requested]
    stock, ours = (gather_bytes(engine, requests) for engine in (v1_stock, v1))
    complaints: dict[str, list[str]] = {}
    for one, expected, got in zip(requested, stock, ours, strict=True):
        if text := complaint(one, expected, got):
            complaints.setdefault(text, []).append(_shown(one, expected, got))
    if CANARY in v1.log.read_text(errors="replace"):
        complaints["the log has a client's text"] = [str(v1.log)]
    record_values(bodies=BODIES, refused=sum(answer.status_code == 400 for answer in ours))
    assert not complaints, "\n".join(
        f"{len(cases)} times: {text}, such as\n{cases[0]}" for text, cases in complaints.items()
    )
    good = chat_body(diversity=0.5, max_tokens=2)
    assert post(v1, "/v1/chat/completions", good).status_code == 200


@pytest.mark.parametrize("path", BASES)
def test_bodies_drawn_from_the_servers_schema(v1, v1_stock, path, record_values):
    """Without the field or with a valid level the status is stock's; a wrong level gets a 400,
    unless vLLM fails at the body itself, before the field is read."""
    pytest.importorskip("schemathesis")
    from tests.schema_bodies import drawn

    bodies = drawn(get(v1_stock, "/openapi.json").json(), path, BODIES_BY_SCHEMA)
    variants = [
        Asked(path, json.dumps(body | field).encode(), is_valid)
        for body in bodies
        # Beam search does not sample, so a level is refused.
        for field, is_valid in (
            ({}, True),
            ({"diversity": 0.5}, not body.get("use_beam_search")),
            ({"diversity": 7}, False),
        )
    ]
    requests = [(one.path, one.body) for one in variants]
    stock, ours = (gather_bytes(engine, requests) for engine in (v1_stock, v1))
    # Each body's first variant has no field.
    fails = [answer.status_code >= 500 for answer in stock[::3] for _ in range(3)]
    wrong = [
        f"{problem}\n{_shown(one, expected, got)}"
        for one, expected, got, at_itself in zip(variants, stock, ours, fails, strict=True)
        if (problem := complaint(one, expected, got))
        and not (at_itself and got.status_code == expected.status_code)
    ]
    record_values(bodies=len(bodies), accepted=sum(answer.status_code == 200 for answer in stock))
    assert len(bodies) == BODIES_BY_SCHEMA
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", routes_with_fields())
@pytest.mark.parametrize("name", PARSE)
def test_a_field_drawn_from_our_schema_is_honoured_or_refused_by_name(
    v1, path, name, record_values
):
    pytest.importorskip("schemathesis")
    from tests.schema_bodies import drawn_values

    values = drawn_values(get(v1, "/openapi.json").json(), path, name, VALUES)
    answers = gather(v1, [(path, BODY_BY_PATH[path] | {name: value}) for value in values])
    wrong = [
        f"{problem}: {json.dumps(value)[:300]}: {answer.status_code} {answer.content[:300]!r}"
        for value, answer in zip(values, answers, strict=True)
        if (problem := _field_complaint(name, value, answer))
    ]
    statuses = [answer.status_code for answer in answers]
    record_values(values=len(values), honoured=statuses.count(200), refused=statuses.count(400))
    assert len(values) == VALUES
    assert set(statuses) == {200, 400}
    assert not wrong, "\n".join(wrong)


def _field_complaint(name: str, value: Any, answer: httpx.Response) -> str | None:
    if answer.status_code == 200:
        return None if _is_valid(name, value) else "a wrong field is not refused"
    if answer.status_code != 400:
        return "another status than 200 and 400"
    if len(answer.content) > MAX_ANSWER_BYTES:
        return "too long an answer"
    is_named = str(answer.json()["error"]["param"]).split(".")[0] == name
    return None if is_named else "the field is not named"


def _is_valid(name: str, value: Any) -> bool:
    """Whether the library accepts it; styles and `human` depend on the server."""
    if value is None or (name, value) == ("diversity", spec.HUMAN):
        return True
    try:
        PARSE[name](value)
    except spec.DiversityError:
        return False
    return True


def _shown(one: Asked, stock: httpx.Response, ours: httpx.Response) -> str:
    return (
        f"    {one.path} {one.body[:100]!r} … {one.body[-200:]!r}\n    stock "
        f"{stock.status_code}, ours {ours.status_code}, {len(ours.content)} bytes: "
        f"{ours.content[:300]!r}"
    )
