"""Whatever comes: a wrong field is a short 400 that names it, the rest is answered as by stock."""

import random

import httpx

from tests.client import chat_body, gather_bytes, post
from tests.fuzz_bodies import CANARY, Asked, asked, complaint

BODIES = 500


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


def _shown(one: Asked, stock: httpx.Response, ours: httpx.Response) -> str:
    return (
        f"    {one.path} {one.body[:100]!r} … {one.body[-200:]!r}\n    stock "
        f"{stock.status_code}, ours {ours.status_code}, {len(ours.content)} bytes: "
        f"{ours.content[:300]!r}"
    )
