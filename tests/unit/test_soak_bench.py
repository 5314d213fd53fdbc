"""bench/soak.py: what its judges accept and what they do not; a phase that fails; the table."""

import random

import httpx
import pytest
import soak
import soak_table
from soak_promises import JUDGES, broken_promises

KEPT = {
    "fuzz": {
        "bodies": 20,
        "refused": 9,
        "faults": {"ours": 1, "stock": 1},
        "complaints": {},
        "in_log": {"a client's text": 0, "the key": 0},
    },
    "served": {
        "requests": 100,
        "outcomes": {"200": 100},
        "requests_per_second": 10.0,
        "pss_mib": [1000.0, 1010.0],
        "growth": 0.01,
    },
    "disconnects": {"cut": 9, "complete": 1, "left": 0, "seconds_to_idle": 4.9},
    "schema": {"requests": 100, "valid": {"ours": 99, "stock": 100}, "in_force": 100},
    "overload": {
        "clients": 64,
        "slots": 16,
        "seconds": 10.0,
        "outcomes": {"200": 50, "429": 1, "503": 1},
        "health": {"asked": 40, "failed": 0, "worst_seconds": 0.99},
    },
}
BROKEN = [
    ("fuzz", {"complaints": {"a wrong field is not refused": 1}}),
    ("fuzz", {"in_log": {"a client's text": 1, "the key": 0}}),
    ("fuzz", {"in_log": {"a client's text": 0, "the key": 1}}),
    ("served", {"growth": 0.0101}),
    ("served", {"outcomes": {"200": 99, "500": 1}}),
    ("served", {"outcomes": {"200": 99, "cut short": 1}}),
    ("disconnects", {"left": 1, "seconds_to_idle": None}),
    ("schema", {"valid": {"ours": 80, "stock": 100}}),
    ("schema", {"in_force": 99}),
    ("overload", {"outcomes": {"200": 50, "500": 1}}),
    ("overload", {"outcomes": {"200": 50, "ReadError": 1}}),
    ("overload", {"health": {"asked": 40, "failed": 1, "worst_seconds": 0.1}}),
    ("overload", {"health": {"asked": 40, "failed": 0, "worst_seconds": 1.0}}),
    ("overload", {"health": {"asked": 0, "failed": 0, "worst_seconds": 0.0}}),
]


@pytest.mark.parametrize("name", JUDGES)
def test_a_kept_promise_is_not_broken(name):
    assert broken_promises(name, {"result": KEPT[name], "died": []}) == []


@pytest.mark.parametrize(("name", "found"), BROKEN)
def test_a_broken_promise_is_told_once(name, found):
    assert len(broken_promises(name, {"result": KEPT[name] | found, "died": []})) == 1


@pytest.mark.parametrize("name", JUDGES)
def test_a_death_or_a_phase_without_end_breaks_it(name):
    assert broken_promises(name, {"result": KEPT[name], "died": ["ours"]})
    assert broken_promises(name, {"failed": "ReadError: ", "died": []})


def test_a_phase_that_fails_is_told(monkeypatch):
    def failing(*_):
        raise RuntimeError("no room")

    monkeypatch.setitem(soak.PHASES, "served", failing)
    monkeypatch.setattr(soak.Servers, "remove_dead", lambda _: ["ours"])
    servers = soak.Servers(None, None)  # type: ignore[arg-type] - none is started
    phase = soak.guarded("served", 10, random.Random(0), servers)
    assert phase["failed"] == "RuntimeError: no room"
    assert len(phase["broken"]) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Al", "kind": "owl", "old": true, "friends": []}', True),
        ('{"name": "Al", "kind": "owl", "old": 1, "friends": []}', False),
        ('{"name": "Al", "kind": "owl", "old": tr', False),
    ],
)
def test_an_answer_is_valid_by_its_schema(text, expected):
    answer = httpx.Response(200, json={"choices": [{"message": {"content": text}}]})
    assert soak.is_valid(answer) is expected


def test_the_table_has_a_line_for_each_phase_and_says_what_is_broken():
    phases = {name: {"result": found, "broken": [], "died": []} for name, found in KEPT.items()}
    phases["schema"] = {"failed": "ReadError: gone", "broken": ["did not end"], "died": []}
    document = {
        "phases": phases,
        "scale": 0.5,
        "machine": {"cores": 2},
        "versions": {"vllm": "0.32"},
        "bench_seconds": 600,
    }
    lines = {
        line.split("|")[1].strip(): line for line in soak_table.table(document).splitlines()[2:7]
    }
    assert set(lines) == set(KEPT)
    assert "no: did not end" in lines["schema"]
    assert all("| yes |" in line for name, line in lines.items() if name != "schema")


def test_short_requests_are_half_with_the_field_and_half_streams():
    source = random.Random(0)
    bodies = [soak.short_request(source)[1] for _ in range(1000)]
    for share in (
        sum("diversity" in body for body in bodies),
        sum(body["stream"] for body in bodies),
    ):
        assert 400 < share < 600  # By chance outside: under 1e-9.
    assert any(body.get("diversity", {}).get("group") for body in bodies)
