"""The rows of docs/clients.md's table: from what was asked through a client to what is recorded."""

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
"""The clients, as the table has them."""

Said = dict[str, Any]
"""What came back for one case: `answer` and `header` (see tests/clients/ways.py), or an `error`."""
Row = dict[str, Any]


def row(client: str, cases: list[tuple[Said, list[Exchange]]]) -> Row:
    """Of what was asked plainly, for a stream and wrongly, with what reached the engine."""
    plain, stream, wrong = (said for said, _ in cases)
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
    """Whether the field reached the engine, which then must have honoured it in each case."""
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


def read(said: Said) -> Row:
    """What of an answer reaches the user."""
    return {"object": bool(said["answer"]), "header": said["header"]}


def refusal(said: Said) -> Row:
    """What of a wrong value's 400 reaches the user."""
    if "error" not in said:
        return {"readable": False, "as": None, "param": None}
    readable = "diversity.level: got 1.5; accepted" in said["text"]
    return {"readable": readable, "as": said["status"] or said["error"], "param": said["param"]}


def as_recorded(client: str, rows: list[Row], versions: dict[str, str]) -> list[Row]:
    """The client's rows in the results; with DFTSERVE_RECORD=1 these become `rows` first."""
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
