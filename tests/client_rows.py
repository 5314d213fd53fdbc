"""The rows of docs/clients.md's table, made from requests through clients and proxies."""

import json
import os
from typing import Any

from tests.conftest import ROOT
from tests.recorder import Exchange

RESULTS = ROOT / "bench" / "results" / "clients.json"
ORDER = (
    "openai",
    "LiteLLM",
    "LiteLLM proxy",
    "langchain-openai",
    "llm",
    "nginx",
    "vllm-router",
    "GZipMiddleware",
)
"""The clients, in the order of the table."""

Outcome = dict[str, Any]
"""The client's outcome of one case: `answer` and `header` (see tests/clients/ways.py), or an
`error`."""
Row = dict[str, Any]


def row(client: str, cases: list[tuple[Outcome, list[Exchange]]]) -> Row:
    """The row of three cases, plain, streamed and with a wrong value, each with the exchanges that
    reached the engine."""
    plain, stream, wrong = (outcome for outcome, _ in cases)
    about = {"client": client, "route": plain["route"], "written": plain["written"]}
    if not any(exchanges for _, exchanges in cases):
        return about | {"field": "refused by the client", "error": wrong["error"]}
    arrived = _arrived(about, [exchanges for _, exchanges in cases])
    assert "error" not in plain, plain
    assert "error" not in stream, stream
    return about | {
        "field": "arrives" if arrived else "lost silently",
        "plain": read(plain),
        "stream": read(stream),
        "wrong": refusal(wrong),
    }


def _arrived(about: Row, cases: list[list[Exchange]]) -> bool:
    """Whether the field reached the engine; asserts that the engine then honoured it each time."""
    sent = {_carries_field(exchange) for exchanges in cases for exchange in exchanges}
    assert len(sent) == 1, (about, cases)
    arrived = sent.pop()
    for exchange in (*cases[0], *cases[1]):
        level = json.loads(exchange.header)["level"] if exchange.header else None
        assert (level == 0.5) == exchange.has_object == arrived, (about, exchange)
    assert cases[2][-1].status == (400 if arrived else 200), (about, cases[2])
    return arrived


def _carries_field(exchange: Exchange) -> bool:
    return "diversity" in exchange.body or "diversity" in (exchange.body.get("vllm_xargs") or {})


def read(outcome: Outcome) -> Row:
    """The parts of an answer that reach the user."""
    return {"object": bool(outcome["answer"]), "header": outcome["header"]}


def refusal(outcome: Outcome) -> Row:
    """The parts of a wrong value's 400 that reach the user."""
    if "error" not in outcome:
        return {"readable": False, "as": None, "param": None}
    readable = "diversity.level: got 1.5; accepted" in outcome["text"]
    shown_as = outcome["status"] or outcome["error"]
    return {"readable": readable, "as": shown_as, "param": outcome["param"]}


def as_recorded(client: str, rows: list[Row], versions: dict[str, str]) -> list[Row]:
    """The client's rows in the results; with DFTSERVE_RECORD=1, `rows` are first written there."""
    document: dict[str, Any] = json.loads(RESULTS.read_text())
    if os.environ.get("DFTSERVE_RECORD") == "1":
        others = [row for row in document["rows"] if row["client"] != client]
        document = {
            "what": "the diversity field through clients and proxies (tests/server)",
            "versions": document["versions"] | versions,
            "rows": sorted([*others, *rows], key=lambda row: ORDER.index(row["client"])),
        }
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    return [row for row in document["rows"] if row["client"] == client]
