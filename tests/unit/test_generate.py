"""Answers are asked for once, whatever happens on the way."""

import collections
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dftserve.evaluate.generate.grid import (
    ANSWERS,
    Answer,
    RequestGrid,
    count_answers,
    doubt,
    generate,
    samples_by_level,
)
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.openai_client import Server
from tests.local_server import reply, serving

CONCURRENCY = 4

Content = Callable[[dict], str | None]


def asking(**changes) -> RequestGrid:
    values = {
        "model": "fake",
        "prompts": tuple(Prompt(f"Say {number}.") for number in range(10)),
        "grid": (0.0, 0.5, 1.0),
        "samples": 2,
    }
    return RequestGrid(**{**values, **changes})


class FakeServer:
    """Says what it was asked, and how often it was asked each thing."""

    def __init__(
        self, seconds: float = 0.0, plugged: bool = True, *, content: Content | None = None
    ) -> None:
        """`content`: what stands in a message in place of the question, from the body."""
        self.asked: collections.Counter[str] = collections.Counter()
        self.bodies: list[dict] = []
        self.seconds, self.plugged = seconds, plugged
        self.content = content or (lambda body: f"{body['messages']} {body['seed']}")

    def __call__(self, request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.asked[key] += 1
        self.bodies.append(body)
        time.sleep(self.seconds)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.content(body)},
        }
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake"}
        answer |= {"choices": [choice], "usage": _usage(7)}
        if self.plugged:
            answer["diversity"] = {"choices": [{"mean_entropy_before": 1.0}]}
        reply(request, 200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def run(url: str, folder: Path, what: RequestGrid | None = None, retries: int = 4) -> list[Answer]:
    return generate(
        what or asking(),
        folder,
        server=Server(f"{url}/v1", retries=retries),
        concurrency=CONCURRENCY,
        tick=lambda done, total: None,
    )


def test_every_answer_once_and_in_order(tmp_path):
    server = FakeServer()
    with serving(server) as url:
        answers = run(url, tmp_path)
        assert run(url, tmp_path) == answers
    assert set(server.asked.values()) == {1}
    assert [answer.key for answer in answers] == [each.key for each in asking().requests()]
    assert len(answers) == 60 == count_answers(tmp_path)


def test_a_grid_is_asked_in_pairs(tmp_path):
    """The answers of a prompt at every diversity have one seed, and different answers another."""
    server = FakeServer()
    with serving(server) as url:
        run(url, tmp_path)
    seeds = collections.defaultdict(set)
    for body in server.bodies:
        seeds[body["seed"]].add(body["diversity"])
    assert len(seeds) == 20
    assert all(levels == {0.0, 0.5, 1.0} for levels in seeds.values())


def test_answers_without_content_are_kept_as_they_came_and_counted(tmp_path):
    """A server with a parser of thinking gives null where the tokens ended inside it."""

    def content(body: dict) -> str | None:
        return None if body["diversity"] == 1 else f"<think>so</think>{body['seed']}"

    with serving(FakeServer(content=content)) as url:
        answers = run(url, tmp_path)
    assert [answer.text is None for answer in answers] == [answer.level == 2 for answer in answers]
    levels = samples_by_level(tmp_path)
    assert [(level.diversity, len(level.samples), level.cut) for level in levels] == [
        *((0.0, 20, 0), (0.5, 20, 0), (1.0, 0, 20))
    ]
    assert all(sample.text.isdecimal() for sample in levels[0].samples), "thinking is left out"


KILLED = """
import sys
from pathlib import Path
from tests.unit.test_generate import run
run(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_run_goes_on_and_asks_nothing_twice_that_was_answered(tmp_path):
    server = FakeServer(seconds=0.03)
    with serving(server) as url:
        process = subprocess.Popen([sys.executable, "-c", KILLED, url, str(tmp_path)])
        try:
            deadline = time.monotonic() + 120
            while answered_lines(tmp_path) < 15 and time.monotonic() < deadline:
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = answered_lines(tmp_path)
        assert 15 <= kept < 60
        answers = run(url, tmp_path)
    assert len(answers) == 60
    twice = [key for key, times in server.asked.items() if times > 1]
    assert len(server.asked) == 60
    assert len(twice) <= CONCURRENCY, "only what was under way when it was killed"
    assert max(server.asked.values()) <= 2


def answered_lines(folder: Path) -> int:
    path = folder / ANSWERS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_half_a_line_is_asked_again(tmp_path):
    server = FakeServer()
    with serving(server) as url:
        before = run(url, tmp_path)
        path = tmp_path / ANSWERS
        os.truncate(path, path.stat().st_size - 5)
        assert run(url, tmp_path) == before
    assert sum(server.asked.values()) == 61


@pytest.mark.parametrize("changed", [{"samples": 3}, {"seed": 1}, {"body": {"top_p": 0.5}}])
def test_another_question_in_the_same_folder_is_refused(tmp_path, changed):
    with serving(FakeServer()) as url:
        run(url, tmp_path)
        with pytest.raises(ValueError, match=next(iter(changed))):
            run(url, tmp_path, asking(**changed))


def test_answers_of_other_weights_are_refused_and_unknown_ones_are_not(tmp_path):
    with serving(FakeServer()) as url:
        run(url, tmp_path, asking(weights="a"))
        with pytest.raises(ValueError, match="answers of other weights"):
            run(url, tmp_path, asking(weights="b"))
        for weights in ("a", None):
            assert len(run(url, tmp_path, asking(weights=weights))) == 60
    assert doubt(asking(weights="a"), tmp_path) is None
    assert "is not known" in (doubt(asking(), tmp_path) or "")


def test_a_server_without_the_plug_in_is_found_out(tmp_path):
    with serving(FakeServer(plugged=False)) as url:
        with pytest.raises(RuntimeError, match="doctor"):
            run(url, tmp_path)
        off = asking(grid=(0.0,))
        assert len(run(url, tmp_path / "off", off)) == 20, "diversity 0 is any server's"


def test_no_server(tmp_path):
    with serving(FakeServer()) as url:
        gone = url
    with pytest.raises(RuntimeError, match="is the server running"):
        run(gone, tmp_path, retries=0)


def test_a_refusal_names_its_reason(tmp_path):
    def refuse(request) -> None:
        body = {"error": {"message": "max_tokens: too many", "type": "BadRequestError"}}
        reply(request, 400, json.dumps(body).encode(), **{"Content-Type": "application/json"})

    with serving(refuse) as url, pytest.raises(ValueError, match="max_tokens: too many"):
        run(url, tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"grid": (0.0, 0.0)}, "each value once"),
        ({"grid": ()}, "nothing"),
        ({"grid": (1.5,)}, "1.5"),
        ({"samples": 0}, "samples"),
        ({"temperature": 3.0}, "temperature"),
        ({"body": {"n": 2}}, "body: got n"),
    ],
)
def test_what_is_not_accepted(changed, told):
    with pytest.raises(ValueError, match=told):
        asking(**changed)
