"""`dftserve verify` against a stand-in that answers as a server with the plug-in would."""

import json

import pytest
from click.testing import CliRunner

from dftserve import __version__
from dftserve.cli import main
from dftserve.doctor import behaviour
from tests.local_server import reply, serving

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


def stand_in(asked, *, greedy="the sea", echo=True, rise=1.0, capabilities=CAPABILITIES):
    """Answers by the level that is asked for; a key that is not right is a 401."""

    def answer(request) -> None:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return reply(request, 401, b"{}")
        if request.command == "GET":
            content = {"data": [{"id": "demo"}]} if "models" in request.path else capabilities
        else:
            body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            asked.append(body)
            content = completion(body)
        said = json.dumps(content).encode()
        return reply(request, 200, said, **{"Content-Type": "application/json"})

    def completion(body):
        level = body.get("diversity")
        text = greedy if level == 0 and body["temperature"] == 0 else "the sea"
        choice = {"index": 0, "finish_reason": "length"}
        choice["message"] = {"role": "assistant", "content": text}
        figures = {"mean_entropy_before": 1.0, "mean_entropy_after": 1.0 + rise * (level or 0)}
        made = {"id": "x", "object": "chat.completion", "created": 1, "model": "demo"}
        made |= {"choices": [choice], "usage": {"completion_tokens": 4, "prompt_tokens": 1}}
        if echo and level is not None:
            made["diversity"] = {"law": "gated", "level": level, "choices": [figures]}
        return made

    return serving(answer)


def run(monkeypatch, *arguments, **stood):
    monkeypatch.setenv("SERVER_KEY", KEY)
    asked: list = []
    with stand_in(asked, **stood) as url:
        command = ["verify", "--url", url, "--api-key-env", "SERVER_KEY", *arguments]
        return CliRunner().invoke(main, command), asked


def test_a_server_that_does_as_it_says(monkeypatch):
    result, asked = run(monkeypatch, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["ok"]
    assert {finding["state"] for finding in report["findings"]} == {"ok"}
    assert report["server"]["device"] == "cpu"
    assert report["figures"]["entropy_rise_nats"] == {"0.25": 0.25, "0.5": 0.5, "1": 1.0}
    assert report["figures"]["tokens_per_second"].keys() == {"idle", "active"}
    for secret in (KEY, behaviour.PROMPT, "the sea", "127.0.0.1"):
        assert secret not in result.output
    tokens = sum(body["max_tokens"] * body.get("n", 1) for body in asked)
    assert tokens < 4000


@pytest.mark.parametrize(
    ("stood", "name"),
    [
        ({"greedy": "the mountain"}, "off is off"),
        ({"echo": False}, "echo"),
        ({"rise": 0.0}, "effect"),
        ({"rise": -1.0}, "effect"),
        ({"capabilities": CAPABILITIES | {"active": False, "reason": "no"}}, "server plug-in"),
    ],
)
def test_what_is_wrong_is_named_and_is_exit_code_1(monkeypatch, stood, name):
    result, _ = run(monkeypatch, "--json", **stood)
    assert result.exit_code == 1, result.output
    findings = json.loads(result.output)["findings"]
    assert [each["name"] for each in findings if each["state"] == "error"] == [name]


def test_it_keeps_to_the_operator_s_caps(monkeypatch):
    capped = CAPABILITIES | {"policy": {"on_excess": "reject", "level": 0.4}}
    result, asked = run(monkeypatch, capabilities=capped)
    assert result.exit_code == 0, result.output
    assert max(body.get("diversity", 0) for body in asked) == 0.4


def test_a_wrong_key_ends_in_one_line(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "wrong")
    with stand_in([]) as url:
        result = CliRunner().invoke(main, ["verify", "--url", url, "--api-key-env", "SERVER_KEY"])
    assert result.exit_code == 1
    assert "another key" in result.output
