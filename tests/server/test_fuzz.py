"""Whatever comes: a wrong field is a short 400 that names it, the rest is answered as by stock."""

import json
import random

import httpx
import pytest

from tests.client import chat_body, gather_bytes, get, post
from tests.fuzz_bodies import BASES, CANARY, Asked, asked, complaint

BODIES = 500
BY_SCHEMA = 40
"""Bodies of each route, which take longer to draw."""


def test_whatever_comes(v1, v1_stock, figure):
    source = random.Random(0)
    requested = [asked(source, number) for number in range(BODIES)]
    requests = [(one.path, one.body) for one in requested]
    stock, ours = (gather_bytes(engine, requests) for engine in (v1_stock, v1))
    complaints: dict[str, list[str]] = {}
    for one, expected, got in zip(requested, stock, ours, strict=True):
        if said := complaint(one, expected, got):
            complaints.setdefault(said, []).append(_shown(one, expected, got))
    if CANARY in v1.log.read_text(errors="replace"):
        complaints["the log has a client's text"] = [str(v1.log)]
    figure(bodies=BODIES, refused=sum(answer.status_code == 400 for answer in ours))
    assert not complaints, "\n".join(
        f"{len(cases)} times: {said}, such as\n{cases[0]}" for said, cases in complaints.items()
    )
    good = chat_body(diversity=0.5, max_tokens=2)
    assert post(v1, "/v1/chat/completions", good).status_code == 200


@pytest.mark.parametrize("path", BASES)
def test_bodies_by_the_servers_own_schema(v1, v1_stock, path, figure):
    """Without the field and with a level, stock's status; with a wrong one a 400 that names it."""
    pytest.importorskip("schemathesis")
    from tests.schema_bodies import drawn

    bodies = drawn(get(v1_stock, "/openapi.json").json(), path, BY_SCHEMA)
    one_of_each = [
        Asked(path, json.dumps(body | field).encode(), is_valid)
        for body in bodies
        # A beam search does not sample, and is refused with a level.
        for field, is_valid in (
            ({}, True),
            ({"diversity": 0.5}, not body.get("use_beam_search")),
            ({"diversity": 7}, False),
        )
    ]
    requests = [(one.path, one.body) for one in one_of_each]
    stock, ours = (gather_bytes(engine, requests) for engine in (v1_stock, v1))
    wrong = [
        f"{said}\n{_shown(one, expected, got)}"
        for one, expected, got in zip(one_of_each, stock, ours, strict=True)
        if (said := complaint(one, expected, got))
    ]
    figure(bodies=len(bodies), accepted=sum(answer.status_code == 200 for answer in stock))
    assert len(bodies) == BY_SCHEMA
    assert not wrong, "\n".join(wrong)


def _shown(one: Asked, stock: httpx.Response, ours: httpx.Response) -> str:
    return (
        f"    {one.path} {one.body[:100]!r} … {one.body[-200:]!r}\n    stock "
        f"{stock.status_code}, ours {ours.status_code}, {len(ours.content)} bytes: "
        f"{ours.content[:300]!r}"
    )
