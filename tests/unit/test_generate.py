"""Each answer is requested once, whatever interrupts the run."""

import collections
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dftserve.evaluate.generate.answers import read
from dftserve.evaluate.generate.grid import (
    ANSWERS,
    Answer,
    RequestGrid,
    count_answers,
    generate,
    samples_by_level,
    unknown_weights_warning,
)
from dftserve.evaluate.generate.in_force import check
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.openai_client import Server
from dftserve.spec import parse
from tests.conftest import PATIENCE
from tests.local_server import in_force, reply, serving
from tests.waiting import wait_until

CONCURRENCY = 4

Content = Callable[[dict], str | None]


def request_grid(**changes) -> RequestGrid:
    values = {
        "model": "fake",
        "prompts": tuple(Prompt(f"Say {number}.") for number in range(10)),
        "grid": (0.0, 0.5, 1.0),
        "samples": 2,
    }
    return RequestGrid(**{**values, **changes})


class FakeServer:
    """Answers with the messages and seed of a request, and counts equal requests."""

    def __init__(
        self,
        plugged: bool = True,
        *,
        content: Content | None = None,
        cap: float = 1.0,
    ) -> None:
        """`content` makes the content of a message from the body; `cap` is as for `in_force`."""
        self.cap = cap
        self.request_counts: collections.Counter[str] = collections.Counter()
        self.bodies: list[dict] = []
        self.plugged = plugged
        self.content = content or (lambda body: f"{body['messages']} {body['seed']}")

    def __call__(self, request) -> None:
        self.answer(request, self.read(request))

    def read(self, request) -> dict:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        self.request_counts[key] += 1
        self.bodies.append(body)
        return body

    def answer(self, request, body: dict) -> None:
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.content(body)},
        }
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake"}
        answer |= {"choices": [choice], "usage": _usage(7)}
        if self.plugged:
            answer |= in_force(body, {"mean_entropy_before": 1.0}, cap=self.cap)
        reply(request, 200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}


def run(url: str, folder: Path, what: RequestGrid | None = None, retries: int = 4) -> list[Answer]:
    return generate(
        what or request_grid(),
        folder,
        server=Server(f"{url}/v1", retries=retries),
        concurrency=CONCURRENCY,
        tick=lambda done, total: None,
    )


def test_every_answer_is_requested_once_and_returned_in_order(tmp_path):
    server = FakeServer()
    with serving(server) as url:
        answers = run(url, tmp_path)
        assert run(url, tmp_path) == answers
    assert set(server.request_counts.values()) == {1}
    assert [answer.key for answer in answers] == [each.key for each in request_grid().requests()]
    assert len(answers) == 60 == count_answers(tmp_path)


def test_the_diversities_of_an_answer_share_a_seed_and_answers_do_not(tmp_path):
    server = FakeServer()
    with serving(server) as url:
        run(url, tmp_path)
    seeds = collections.defaultdict(set)
    for body in server.bodies:
        seeds[body["seed"]].add(body["diversity"])
    assert len(seeds) == 20
    assert all(levels == {0.0, 0.5, 1.0} for levels in seeds.values())


def test_answers_without_content_are_stored_as_they_are_and_counted(tmp_path):
    """A server with a parser of thinking returns null if the tokens ended inside it."""

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


def test_a_killed_run_resumes_without_repeating_answered_requests(tmp_path):
    """The server stops answering after 25 of 60 requests; the run is killed while it waits."""
    speaks_again, places = threading.Event(), itertools.count()

    class Silent(FakeServer):
        def __call__(self, request) -> None:
            body = self.read(request)
            if speaks_again.is_set() or next(places) < 25:
                self.answer(request, body)
            else:
                speaks_again.wait(PATIENCE)

    server = Silent()
    with serving(server) as url:
        process = subprocess.Popen([sys.executable, "-c", KILLED, url, str(tmp_path)])
        try:
            wait_until(lambda: answered_lines(tmp_path) >= 25, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert answered_lines(tmp_path) == 25
        speaks_again.set()
        answers = run(url, tmp_path)
    assert len(answers) == 60
    twice = [key for key, times in server.request_counts.items() if times > 1]
    assert len(server.request_counts) == 60
    assert len(twice) <= CONCURRENCY, "only requests in flight when it was killed"
    assert max(server.request_counts.values()) <= 2


def answered_lines(folder: Path) -> int:
    path = folder / ANSWERS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_answer_of_a_truncated_line_is_requested_again(tmp_path):
    server = FakeServer()
    with serving(server) as url:
        before = run(url, tmp_path)
        path = tmp_path / ANSWERS
        os.truncate(path, path.stat().st_size - 5)
        assert run(url, tmp_path) == before
    assert sum(server.request_counts.values()) == 61


@pytest.mark.parametrize("changed", [{"samples": 3}, {"seed": 1}, {"body": {"top_p": 0.5}}])
def test_another_grid_in_the_same_folder_is_refused(tmp_path, changed):
    with serving(FakeServer()) as url:
        run(url, tmp_path)
        with pytest.raises(ValueError, match=next(iter(changed))):
            run(url, tmp_path, request_grid(**changed))


def test_answers_of_other_weights_are_refused_and_unknown_ones_are_not(tmp_path):
    with serving(FakeServer()) as url:
        run(url, tmp_path, request_grid(weights="a"))
        with pytest.raises(ValueError, match="answers of other weights"):
            run(url, tmp_path, request_grid(weights="b"))
        for weights in ("a", None):
            assert len(run(url, tmp_path, request_grid(weights=weights))) == 60
    assert unknown_weights_warning(request_grid(weights="a"), tmp_path) is None
    assert "is not known" in (unknown_weights_warning(request_grid(), tmp_path) or "")


def test_a_server_without_the_plug_in_is_detected(tmp_path):
    with serving(FakeServer(plugged=False)) as url:
        with pytest.raises(RuntimeError, match="doctor"):
            run(url, tmp_path)
        off = request_grid(grid=(0.0,))
        assert len(run(url, tmp_path / "off", off)) == 20, "any server can do diversity 0"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (0.0, 0.75)}, r'diversity: asked for 0\.75, .*"level": 0\.6.*in force'),
        ({"grid": ({"law": "words", "level": 0.9},)}, '"clamped": {"level": 0.9}'),
        ({"grid": (0.5,), "body": {"style": "habits"}}, None),
        ({"body": {"style": {"name": "habits", "strength": 0.8}}}, '"strength": 0.6'),
        ({"grid": (0.0, 0.25, 0.6)}, None),
    ],
)
def test_a_level_that_the_server_lowered_is_refused(tmp_path, changed, message):
    """Otherwise texts all sampled at .6 would be reported as two diversities."""
    what = request_grid(**changed)
    with serving(FakeServer(cap=0.6)) as url:
        if message is None:
            assert len(run(url, tmp_path, what)) == 20 * len(what.grid)
            return
        with pytest.raises(ValueError, match=message):
            run(url, tmp_path, what)
    stored = {answer.level for answer in read(tmp_path / ANSWERS, Answer)}
    assert stored <= {0}, "texts sampled at another level are not stored"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"law": "gated", "level": 0, "reason": "temperature 0"}, "temperature 0"),
        ({"law": "guard", "level": 0.5, "max_temperature": 4.0}, '"law": "guard"'),
        ({"law": "gated", "level": 0.5, "max_temperature": 2.0}, '"max_temperature": 2.0'),
        ({}, '"level": null'),
    ],
)
def test_other_settings_in_force_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        check({"diversity": 0.5}, {"diversity": found})


def test_the_settings_in_force_may_have_additional_fields():
    """The client's own min_p, what was dropped, the statistics."""
    found = parse(0.5).as_dict() | {"min_p": 0.1, "dropped": {"top_p": 0.9}, "choices": [None]}
    check({"diversity": 0.5}, {"diversity": found})
    check({"diversity": 0}, {})
    with pytest.raises(ValueError, match=r'"level": 0\.3'):
        check({"diversity": 0}, {"diversity": parse(0.3).as_dict()})


def test_human_is_sent_unchanged(tmp_path):
    """Only the server knows what it stands for; it is refused if the law is off."""
    server = FakeServer()
    with serving(server) as url:
        assert len(run(url, tmp_path, request_grid(grid=(0.0, "human")))) == 40
    assert {body["diversity"] for body in server.bodies} == {0.0, "human"}
    with pytest.raises(ValueError, match="temperature 0"):
        check({"diversity": "human"}, {"diversity": {"law": "budget", "reason": "temperature 0"}})


def test_an_unreachable_server_is_reported(tmp_path):
    with serving(FakeServer()) as url:
        gone = url
    with pytest.raises(RuntimeError, match="is the server running"):
        run(gone, tmp_path, retries=0)


def test_a_refusal_is_reported_with_its_reason(tmp_path):
    def refuse(request) -> None:
        body = {"error": {"message": "max_tokens: too many", "type": "BadRequestError"}}
        reply(request, 400, json.dumps(body).encode(), **{"Content-Type": "application/json"})

    with serving(refuse) as url, pytest.raises(ValueError, match="max_tokens: too many"):
        run(url, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": (0.0, 0.0)}, "each value once"),
        ({"grid": ()}, "nothing"),
        ({"grid": (1.5,)}, "1.5"),
        ({"samples": 0}, "samples"),
        ({"temperature": 3.0}, "temperature"),
        ({"body": {"n": 2}}, "body: got n"),
        ({"temperature": 0.0}, "greedy decoding does not sample"),
        ({"temperature": 0.0, "grid": (0.0, "human")}, "greedy decoding does not sample"),
        ({"grid": ("humane",)}, "humane"),
    ],
)
def test_invalid_grids_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        request_grid(**changed)
