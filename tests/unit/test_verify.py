"""`dftserve verify` against a stand-in for a server with the plug-in."""

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from dftserve import __version__
from dftserve.cli import main
from dftserve.doctor import behaviour
from tests.conftest import PATIENCE
from tests.local_server import reply, serving

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-secret-key"
CAPABILITIES = {
    "dftserve": __version__,
    "vllm": "0.32.0",
    "runner": "V1",
    "device": "cpu",
    "active": True,
    "answers": True,
    "styles": ["human"],
    "hooks_missing": {},
    "policy": None,
}


REFUSAL = (
    "diversity.level: got 0.5; accepted: at most 0.3, which is what the operator's policy allows"
)


def stand_in(
    received,
    *,
    greedy="the sea",
    echo=True,
    rise=1.0,
    capabilities=CAPABILITIES,
    max_level=1.0,
    styles=True,
    in_force=lambda level: {"level": level},
):
    """A server that answers by the requested level, with a 401 for a wrong key, and a 400 for a
    level above `max_level`."""

    def answer(request) -> None:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return reply(request, 401, b"{}")
        if request.command == "GET":
            content = {"data": [{"id": "demo"}]} if "models" in request.path else capabilities
        else:
            body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            received.append(body)
            if body.get("diversity", 0) > max_level:
                refusal = {"error": {"message": REFUSAL, "param": "diversity.level", "code": 400}}
                return reply(
                    request,
                    400,
                    json.dumps(refusal).encode(),
                    **{"Content-Type": "application/json"},
                )
            content = completion(body)
        encoded = json.dumps(content).encode()
        return reply(request, 200, encoded, **{"Content-Type": "application/json"})

    def completion(body):
        level = body.get("diversity")
        text = greedy if level == 0 and body["temperature"] == 0 else "the sea"
        choice = {"index": 0, "finish_reason": "length"}
        choice["message"] = {"role": "assistant", "content": text}
        effective = in_force(level)
        heat = 0 if effective.get("max_temperature", 4) <= 1 else rise * (effective["level"] or 0)
        statistics = {"mean_entropy_before": 1.0, "mean_entropy_after": 1.0 + heat}
        made = {"id": "x", "object": "chat.completion", "created": 1, "model": "demo"}
        made |= {"choices": [choice], "usage": {"completion_tokens": 4, "prompt_tokens": 1}}
        if echo and level is not None:
            made["diversity"] = {"law": "gated", **effective, "choices": [statistics]}
        if styles and "style" in body:
            made["style"] = {"name": body["style"], "strength": 1.0, "max_kl": 0.05}
        return made

    return serving(answer)


def run(monkeypatch, *arguments, **options):
    monkeypatch.setenv("SERVER_KEY", KEY)
    received: list = []
    with stand_in(received, **options) as url:
        command = ["verify", "--url", url, "--api-key-env", "SERVER_KEY", *arguments]
        return CliRunner().invoke(main, command), received


def test_a_correct_server_passes(monkeypatch):
    result, received = run(monkeypatch, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"]
    assert {finding["state"] for finding in report["findings"]} == {"ok"}
    assert report["server"]["device"] == "cpu"
    assert report["measurements"]["entropy_rise_nats"] == {"0.25": 0.25, "0.5": 0.5, "1": 1.0}
    assert report["measurements"]["tokens_per_second"].keys() == {"idle", "active"}
    for secret in (KEY, behaviour.PROMPT, "the sea", "127.0.0.1"):
        assert secret not in result.output
    tokens = sum(body["max_tokens"] * body.get("n", 1) for body in received)
    assert (len(received), tokens) == (behaviour.REQUESTS, behaviour.MOST_TOKENS)
    text = (ROOT / "docs" / "operations.md").read_text()
    assert f"at most {behaviour.REQUESTS} short requests, {behaviour.MOST_TOKENS:,} tokens" in text
    # Both set the field: without it the server's default would apply.
    timed = [body for body in received if body["temperature"] == 1 and body.get("n", 1) == 1]
    assert {body.get("diversity") for body in timed} == {0, 1}
    assert [body["style"] for body in received if "style" in body] == ["human"]


def test_a_slow_server_can_be_given_longer():
    done = threading.Event()

    def slow(request):
        if request.command == "POST":
            done.wait(PATIENCE)
            return
        content = {"data": [{"id": "demo"}]} if "models" in request.path else CAPABILITIES
        reply(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    with serving(slow) as url:
        result = CliRunner().invoke(main, ["verify", "--url", url, "--timeout", "1"])
    done.set()
    assert result.exit_code == 1
    assert "did not answer within 1 s; give it longer (--timeout)" in result.output


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid", "https://127.0.0.1:9"]
)
def test_the_report_on_an_unreachable_server_has_no_address(address):
    result = CliRunner().invoke(main, ["verify", "--url", address, "--json"])
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)["findings"]
    assert "cannot be reached" in finding["text"]
    for part in ("127.0.0.1", "no-such-host", "http:", "https:"):
        assert part not in result.output
    output = CliRunner().invoke(main, ["verify", "--url", address]).output
    assert address.removesuffix("/v1") in output


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"greedy": "the mountain"}, "off is off"),
        ({"echo": False}, "echo"),
        ({"rise": 0.0}, "effect"),
        ({"rise": -1.0}, "effect"),
        ({"styles": False}, "styles"),
        ({"capabilities": CAPABILITIES | {"active": False, "reason": "no"}}, "server plug-in"),
    ],
)
def test_a_failed_check_is_named_with_exit_code_1(monkeypatch, options, name):
    result, _ = run(monkeypatch, "--json", **options)
    assert result.exit_code == 1, result.output
    findings = json.loads(result.stdout)["findings"]
    assert [each["name"] for each in findings if each["state"] == "error"] == [name]


def test_requests_stay_within_the_operators_caps(monkeypatch):
    capped = CAPABILITIES | {"policy": {"on_excess": "reject", "level": 0.4}}
    result, received = run(monkeypatch, capabilities=capped)
    assert result.exit_code == 0, result.output
    assert max(body.get("diversity", 0) for body in received) == 0.4


POLICIES = {
    "the level is capped at 0": ({"level": 0}, 1.0, "effect"),
    "without gated": ({"laws": ["budget"]}, 1.0, "effect"),
    "a key that has less": ({"level": 0.6}, 0.2, "effect"),
    "a key where the server has no cap": ({}, 0.3, "effect"),
    "no styles": ({"styles": []}, 1.0, "styles"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_check_that_the_policy_forbids_is_a_warning(monkeypatch, policy):
    policy_fields, max_level, name = POLICIES[policy]
    capped = CAPABILITIES | {"policy": {"on_excess": "reject", **policy_fields}}
    result, _ = run(monkeypatch, "--json", capabilities=capped, max_level=max_level)
    assert result.exit_code == 0, result.output
    findings = json.loads(result.stdout)["findings"]
    (warned,) = [each for each in findings if each["state"] != "ok"]
    assert (warned["name"], warned["state"]) == (name, "warning")
    assert "policy" in warned["text"]


LOWERED = {
    "the temperature": (lambda level: {"level": level, "max_temperature": 1.0}, ["effect"]),
    "every level": (
        lambda level: {"level": min(level or 0, 0.2), "clamped": {"level": level}},
        ["echo", "effect"],
    ),
}


@pytest.mark.parametrize("what", LOWERED)
def test_a_policy_that_lowers_values_until_nothing_can_rise_is_a_warning(monkeypatch, what):
    in_force, warned = LOWERED[what]
    clamps = CAPABILITIES | {"policy": {"on_excess": "clamp"}}
    result, _ = run(monkeypatch, "--json", capabilities=clamps, in_force=in_force)
    assert result.exit_code == 0, result.output
    findings = {each["name"]: each for each in json.loads(result.stdout)["findings"]}
    assert [name for name, each in findings.items() if each["state"] != "ok"] == warned
    assert "not checked: the operator's policy" in findings["effect"]["text"]
    # Without a policy, a lowered value is an error.
    result, _ = run(monkeypatch, in_force=in_force)
    assert result.exit_code == 1


def test_a_wrong_key_is_reported(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "wrong")
    with stand_in([]) as url:
        result = CliRunner().invoke(main, ["verify", "--url", url, "--api-key-env", "SERVER_KEY"])
    assert result.exit_code == 1
    assert "not that server's" in result.output
