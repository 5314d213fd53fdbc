"""bench/soak.py: what its checks accept; failing phases; runs of some phases only; the table."""

import json
import random
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import soak
import soak_table
from click.testing import CliRunner
from soak_promises import JUDGES, broken_promises

from tests.conftest import PATIENCE
from tests.fuzz_bodies import MAX_ANSWER_BYTES, Asked, complaint
from tests.local_server import serving

PASSING = {
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
        "own_mib": [1000.0, 1010.0],
        "growth": 0.01,
        "stock": {"own_mib": [900.0, 954.0], "growth": 0.06, "outcomes": {"200": 100}},
        "grown_mib": {"ours": {"Worker 3": 10.0}, "stock": {"Worker 3": 54.0}},
    },
    "disconnects": {"cut": 9, "complete": 1, "left": 0, "seconds_to_idle": 4.9},
    "schema": {"requests": 100, "valid": {"ours": 99, "stock": 100}, "in_force": 100},
    "overload": {
        "clients": 64,
        "slots": 16,
        "seconds": 10.0,
        "outcomes": {"200": 50, "429": 1, "503": 1},
        "health": {"asked": 40, "failed": 0, "worst_seconds": 0.99},
        "stock": {
            "outcomes": {"200": 60},
            "health": {"asked": 40, "failed": 0, "worst_seconds": 1.5},
        },
    },
}
FAILING = [
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
def test_passing_results_break_no_promise(name):
    assert broken_promises(name, {"result": PASSING[name], "died": []}) == []


@pytest.mark.parametrize(("name", "changed"), FAILING)
def test_a_broken_promise_is_reported_once(name, changed):
    assert len(broken_promises(name, {"result": PASSING[name] | changed, "died": []})) == 1


@pytest.mark.parametrize("name", JUDGES)
def test_a_dead_server_or_a_failed_phase_breaks_a_promise(name):
    assert broken_promises(name, {"result": PASSING[name], "died": ["ours"]})
    assert broken_promises(name, {"failed": "ReadError: ", "died": []})


def test_a_failing_phase_is_reported(monkeypatch):
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
def test_an_answer_is_valid_if_it_matches_the_schema(text, expected):
    answer = httpx.Response(200, json={"choices": [{"message": {"content": text}}]})
    assert soak.is_valid(answer) is expected


def test_the_table_has_a_line_for_each_phase_and_names_what_is_broken():
    phases = {
        name: {"result": result, "broken": [], "died": [], "seconds": 120.0}
        for name, result in PASSING.items()
    }
    phases["schema"] = {"failed": "ReadError", "broken": ["did not end"], "died": [], "seconds": 60}
    document = {
        "phases": phases,
        "scale": 0.5,
        "machine": {"cores": 2},
        "versions": {"vllm": "0.32"},
    }
    table = soak_table.table(document)
    assert "it took 9 minutes" in table
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()[2:7]}
    assert set(lines) == set(PASSING)
    assert "no: did not end" in lines["schema"]
    assert all("| yes |" in line for name, line in lines.items() if name != "schema")


def table_of(name, result):
    phase = {"result": result, "broken": [], "died": [], "seconds": 60.0}
    header = {"scale": 1, "machine": {"cores": 2}, "versions": {"vllm": "0.32"}}
    return soak_table.table({"phases": {name: phase}, **header})


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("served", ["(+1.00%)", "stock's 900 MiB", "(+6.00%)", "Worker 3 +10.0 and +54.0"]),
        ("overload", ["/health 990 ms", "stock's: 60 × 200; /health 1500 ms"]),
    ],
)
def test_the_table_compares_our_results_with_stocks(name, parts):
    without_stock = {key: value for key, value in PASSING[name].items() if key != "stock"}
    assert all(part in table_of(name, PASSING[name]) for part in parts)
    assert "stock's" not in table_of(name, without_stock).split("| asked")[1]


def fake_servers():
    engines = {name: SimpleNamespace(name=name, pid=pid) for pid, name in enumerate(soak.SERVERS)}
    return SimpleNamespace(get=engines.__getitem__)


def test_both_servers_get_the_same_requests_and_their_growth_is_reported_by_process(monkeypatch):
    received = {name: [] for name in soak.SERVERS}

    async def serve(engine, requests, source):
        part = [soak.short_request(source) for _ in requests]
        received[engine.name] += part
        return Counter({"200": len(part)})

    memory = {0: iter(range(100, 200)), 1: iter(range(100, 300, 3))}  # MiB, by process id.
    monkeypatch.setattr(soak, "_served", serve)
    monkeypatch.setattr(soak, "own_mib", lambda pid: {"Worker": float(next(memory[pid]))})
    result = soak.served(30, random.Random(0), fake_servers())  # type: ignore[arg-type]
    assert len(received["ours"]) == 30
    assert received["ours"] == received["stock"]
    assert result["outcomes"] == result["stock"]["outcomes"] == {"200": 30}
    assert result["by_process_mib"] == {"Worker": [*range(100, 110)]}
    assert result["growth"] == pytest.approx(0.09)
    assert result["stock"]["growth"] == pytest.approx(0.27)
    assert result["grown_mib"] == {"ours": {"Worker": 9.0}, "stock": {"Worker": 27.0}}


def test_both_servers_get_the_same_overload(monkeypatch):
    async def overloaded(engine, seconds, source):
        return Counter({f"{engine.name} {seconds} {source.random()}": 1})

    monkeypatch.setattr(soak, "_overloaded", overloaded)
    monkeypatch.setattr(soak, "_health_watched", lambda engine: nullcontext([0.5]))
    result = soak.overload(7, random.Random(0), fake_servers())  # type: ignore[arg-type]
    (ours,), (stock,) = result["outcomes"], result["stock"]["outcomes"]
    assert ours.removeprefix("ours") == stock.removeprefix("stock")
    assert result["health"] == result["stock"]["health"]


def test_health_is_watched_until_the_work_ends():
    """From a process of its own; failures are recorded too."""
    paths: list[str] = []
    third = threading.Event()

    def answer(handler) -> None:
        paths.append(handler.path)
        handler.send_response(200 if len(paths) != 2 else 503)
        handler.end_headers()
        if len(paths) == 3:
            third.set()

    with serving(answer) as url, soak._health_watched(SimpleNamespace(url=url)) as measured:  # type: ignore[arg-type]
        assert third.wait(PATIENCE)
    assert set(paths) == {"/health"}
    assert len(measured) in (len(paths), len(paths) - 1)
    assert [seconds is None for seconds in measured[:3]] == [False, True, False][: len(measured)]
    assert all(seconds > 0 for seconds in measured if seconds is not None)


def test_half_of_the_short_requests_have_the_field_and_half_are_streams():
    source = random.Random(0)
    bodies = [soak.short_request(source)[1] for _ in range(1000)]
    for share in (
        sum("diversity" in body for body in bodies),
        sum(body["stream"] for body in bodies),
    ):
        assert 400 < share < 600  # Outside by chance: p < 1e-9.
    assert any(body.get("diversity", {}).get("group") for body in bodies)


GOOD, NAMED = httpx.Response(200), httpx.Response(400, json={"error": {"param": "diversity.level"}})
UNNAMED = httpx.Response(400, json={"error": {"param": "messages"}})
LONG = httpx.Response(
    400, json={"error": {"param": "diversity", "message": MAX_ANSWER_BYTES * "a"}}
)
NOT_THERE, FAULT = httpx.Response(404), httpx.Response(500)


@pytest.mark.parametrize(
    ("is_valid", "stock", "ours", "expected"),
    [
        (True, GOOD, GOOD, None),
        (True, UNNAMED, UNNAMED, None),
        (True, FAULT, FAULT, None),
        (True, GOOD, NAMED, "another status than stock's"),
        (True, UNNAMED, GOOD, "another status than stock's"),
        (True, FAULT, GOOD, "another status than stock's"),
        (True, GOOD, FAULT, "a server error that stock does not have"),
        (True, UNNAMED, FAULT, "a server error that stock does not have"),
        (False, GOOD, NAMED, None),
        (False, GOOD, UNNAMED, "the parameter is not named"),
        (False, GOOD, LONG, "too long an answer"),
        (False, GOOD, GOOD, "a wrong field is not refused"),
        (False, GOOD, FAULT, "a server error that stock does not have"),
        (False, UNNAMED, UNNAMED, None),
        (False, NOT_THERE, NOT_THERE, None),
        (False, NOT_THERE, NAMED, "another status than stock's"),
        (False, UNNAMED, FAULT, "a server error that stock does not have"),
        (False, FAULT, NAMED, None),
        (False, FAULT, UNNAMED, "the parameter is not named"),
        (False, FAULT, GOOD, "a wrong field is not refused"),
        (False, FAULT, FAULT, "a wrong field is not refused"),
    ],
)
def test_a_wrong_field_must_be_refused_by_name_unless_stock_refuses_the_rest(
    is_valid, stock, ours, expected
):
    assert complaint(Asked("/v1/completions", b"", is_valid), stock, ours) == expected


@pytest.fixture
def run_soak(monkeypatch, tmp_path):
    """Runs the bench with phases that return PASSING without a server; returns the result of the
    command and the document that it wrote."""
    monkeypatch.setattr(soak, "tuned_model", Path)
    monkeypatch.setattr(soak, "machine", lambda: {"cores": 2})
    monkeypatch.setattr(soak, "versions", lambda *_: {"vllm": "0.32"})
    for name in soak.PHASES:
        monkeypatch.setitem(soak.PHASES, name, lambda *_, name=name: PASSING[name])
    output = tmp_path / "soak.json"

    def run(*options):
        result = CliRunner().invoke(soak.main, [*options, "--output", str(output)])
        return result, json.loads(output.read_text()) if output.exists() else None

    return run


def test_a_full_run_has_every_phase_and_its_seconds(run_soak):
    result, document = run_soak()
    assert (result.exit_code, document["kept"]) == (0, True)
    assert list(document["phases"]) == list(soak.SIZES)
    assert all(phase["seconds"] >= 0 for phase in document["phases"].values())


def test_a_run_of_some_phases_replaces_these_and_keeps_the_others(run_soak, monkeypatch):
    monkeypatch.setitem(
        soak.PHASES, "fuzz", lambda *_: PASSING["fuzz"] | {"complaints": {"one": 1}}
    )
    result, before = run_soak()
    assert (result.exit_code, before["kept"]) == (1, False)
    clock = SimpleNamespace(monotonic=iter([100.0, 107.5]).__next__)
    monkeypatch.setattr(soak, "time", clock)
    monkeypatch.setitem(soak.PHASES, "fuzz", lambda *_: PASSING["fuzz"] | {"refused": 8})
    result, document = run_soak("--only", "fuzz")
    assert (result.exit_code, document["kept"]) == (0, True)
    again = document["phases"].pop("fuzz")
    assert (again["result"]["refused"], again["seconds"]) == (8, 7.5)
    del before["phases"]["fuzz"]
    assert document["phases"] == before["phases"]


def test_a_run_of_some_phases_alone_does_not_pass(run_soak):
    result, document = run_soak("--only", "schema", "--only", "fuzz")
    assert list(document["phases"]) == ["fuzz", "schema"]
    assert (result.exit_code, document["kept"]) == (0, False)


@pytest.mark.parametrize("name", ["served", "overload"])
def test_a_failure_of_another_phase_remains(run_soak, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setitem(soak.PHASES, name, lambda *_: PASSING[name] | dict(FAILING)[name])
        run_soak()
    result, document = run_soak("--only", "fuzz")
    assert (result.exit_code, document["kept"]) == (1, False)


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (["--scale", "0.5"], {}, "scale: the output has 1.0, this run 0.5"),
        (["--seed", "1"], {}, "seed: the output has 0, this run 1"),
        ([], {"machine": {"cores": 3}}, "machine: the output has {'cores': 2}"),
        ([], {"versions": {"vllm": "0.33"}}, "versions: the output has {'vllm': '0.32'}"),
    ],
)
def test_phases_of_a_run_with_other_settings_are_not_merged(
    run_soak, monkeypatch, options, changed, message
):
    _, before = run_soak()
    for name, value in changed.items():
        monkeypatch.setattr(soak, name, lambda *_, value=value: value)
    result, document = run_soak("--only", "fuzz", *options)
    assert (result.exit_code, document) == (1, before)
    assert message in result.output


def test_an_unknown_phase_is_refused(run_soak):
    result, document = run_soak("--only", "fuz")
    assert (result.exit_code, document) == (2, None)
    assert "'fuz' is not one of 'fuzz'" in result.output
