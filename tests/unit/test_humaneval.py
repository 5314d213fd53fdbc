"""HumanEval: reading, extraction, the estimator against brute force, and the 164 solutions."""

import gzip
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.evaluate.accuracy import humaneval
from dftserve.evaluate.accuracy.grade import CUT, UNREADABLE
from dftserve.evaluate.accuracy.humaneval import Problem
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.isolation.sandbox import Limits
from dftserve.evaluate.generate.client import Served
from tests.local_server import in_force, reply, serving

ADD = Problem(
    task_id="T/0",
    prompt='from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """ a + b """\n',
    entry_point="add",
    canonical_solution="    return a + b\n",
    test="def check(candidate):\n    assert candidate(1, 2) == 3 == candidate(2, 1)\n",
)


@pytest.fixture(scope="module")
def _sandboxed():
    if (missing := sandbox.available()) is not None:
        pytest.skip(missing)


@pytest.fixture(scope="module")
def problems() -> tuple[Problem, ...]:
    path = Path(os.environ.get("DFTSERVE_DATA", "")) / "accuracy" / "HumanEval.jsonl.gz"
    if "DFTSERVE_DATA" not in os.environ or not path.is_file():
        pytest.skip("DFTSERVE_DATA has no accuracy/HumanEval.jsonl.gz")
    return humaneval.read(path)


def passed(problems, completions) -> list[bool]:
    results = humaneval.judge(problems, [[each] for each in completions], Limits(seconds=30))
    return [result.passed for (result,) in results]


@pytest.mark.usefixtures("_sandboxed")
def test_every_canonical_solution_passes(problems):
    assert len(problems) == 164
    assert all(passed(problems, [problem.canonical_solution for problem in problems]))


@pytest.mark.usefixtures("_sandboxed")
def test_no_wrong_solution_passes(problems):
    """Solutions that do nothing, or exit before the tests run."""
    wrong = ["    pass\n", "    import os; os._exit(0)\n", "    raise SystemExit(0)\n"]
    some = [(problem, each) for problem in problems[::8] for each in wrong]
    assert not any(passed(*zip(*some, strict=True)))


@pytest.mark.usefixtures("_sandboxed")
@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return a + b\n", True),
        ("return a + b", True),
        ("    return a - b\n", False),
        (f"Here:\n```python\n{ADD.prompt}    return a + b\n```\nThat adds.", True),
        ("```python\ndef add(a, b):\n    return sum([a, b])\n```", True),
        ("```py\ndef add(a, b): return 7\n```\nNo:\n```\ndef add(a, b):\n  return a+b\n```", True),
        ("```python\nimport math\n\ndef add(a: int, b: int) -> int:\n    return a + b", True),
        ("def add(a, b):\n    return a + b", True),
        ("```python\n    total = a + b\n    return total\n```", True),
        ("```python\ndef sub(a, b):\n    return a - b\n```", False),
        ("I cannot.", False),
        ("", False),
        ("```python\n```", False),
    ],
)  # fmt: skip
def test_code_is_extracted_from_an_answer(answer, right):
    assert passed([ADD], [answer]) == [right]


def test_unreadable_and_cut_answers_are_not_run(monkeypatch):
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: pytest.fail("it was run"))
    answers = ["I cannot.", None, "<think>a + b", "```python\ndef sub(a, b):\n    return 1\n```"]
    (judged,) = humaneval.judge([ADD], [answers])
    assert [each.ended for each in judged] == [UNREADABLE, CUT, CUT, UNREADABLE]
    assert not any(each.passed for each in judged)


def test_the_estimator_is_the_share_of_subsets_with_a_pass():
    for samples in range(1, 8):
        for right in range(samples + 1):
            marks = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                subsets = list(itertools.combinations(marks, k))
                share = sum(map(any, subsets)) / len(subsets)
                assert humaneval.pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


@given(st.integers(1, 300), st.data())
def test_the_estimator_increases_with_k_and_with_passes(samples, data):
    right = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    estimate = humaneval.pass_at_k(samples, right, k)
    assert 0 <= estimate <= 1
    assert humaneval.pass_at_k(samples, right, 1) == pytest.approx(right / samples)
    if k < samples:
        assert humaneval.pass_at_k(samples, right, k + 1) >= estimate
    if right < samples:
        assert humaneval.pass_at_k(samples, right + 1, k) >= estimate


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1)])
def test_the_estimator_refuses_invalid_counts(samples, right, k):
    with pytest.raises(ValueError, match="accepted: 1 ≤ k"):
        humaneval.pass_at_k(samples, right, k)


def test_read_refuses_an_invalid_line(tmp_path):
    for suffix, opened in ((".jsonl", open), (".jsonl.gz", gzip.open)):
        path = tmp_path / f"problems{suffix}"
        with opened(path, "wt") as file:
            file.write(json.dumps(vars(ADD)) + "\n\n")
        assert humaneval.read(path) == (ADD,)
        with opened(path, "at") as file:
            file.write('{"task_id": "T/1"}\n')
        with pytest.raises(ValueError, match=r"prompt.*accepted: lines of JSON"):
            humaneval.read(path)


def test_stored_answers_are_not_requested_again(tmp_path):
    """The first run fails at problem 4, and the file then ends in half a line."""
    problems = [replace(ADD, task_id=f"T/{number}", prompt=f"# {number}\n") for number in range(6)]
    requested, failing = [], [True]

    def answer(request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        number = int(body["prompt"].split()[1])
        requested.append(number)
        if failing[0] and number > 3:
            reply(request, 400, b'{"error": {"message": "no"}}')
            return
        content = {"choices": [{"index": 0, "text": f"{number}"}], **in_force(body)}
        reply(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    saved = tmp_path / "said.jsonl"
    with serving(answer) as url:
        served = Served(f"{url}/v1", "m", is_chat=False, at_once=1)
        with pytest.raises(ValueError, match="refuses the request: no"):
            humaneval.ask(problems, served, 0.5, saved=saved)
        failing[0] = False
        with saved.open("a") as file:
            file.write('{"problem": "T/4", "sa')
        first = [number for number in requested if number <= 3]
        requested.clear()
        answers = humaneval.ask(problems, served, 0.5, saved=saved)
    assert first == [0, 1, 2, 3]
    assert requested == [4, 5]
    assert answers == [[f"{number}"] for number in range(6)]


@pytest.mark.usefixtures("_sandboxed")
@pytest.mark.parametrize("is_chat", [True, False])
def test_each_level_is_requested_and_judged(is_chat):
    """The server's answers are wrong at diversity 1, and in every second sample at 0."""
    bodies = []

    def answer(request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        bodies.append((request.path, body))
        right = [body["diversity"] < 1 and n % 2 == 0 for n in range(body["n"])]
        texts = [f"    return a {'+' if each else '-'} b\n" for each in right]
        message = [{"message": {"role": "assistant", "content": text}} for text in texts]
        choices = message if is_chat else [{"text": text} for text in texts]
        content = {"choices": [{"index": n, **each} for n, each in enumerate(choices)]}
        content |= in_force(body)
        reply(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    with serving(answer) as url:
        served = Served(f"{url}/v1", "m", temperature=0.7, is_chat=is_chat)
        measured = {
            level: humaneval.measure([ADD, ADD], served, level, samples=4) for level in (0.0, 1.0)
        }
    assert [each.right for each in measured[0.0]] == [(True, False, True, False)] * 2
    assert [each.right for each in measured[1.0]] == [(False,) * 4] * 2
    assert measured[0.0][0].judged == ("ok", "exception", "ok", "exception")
    assert {path for path, _ in bodies} == {
        "/v1/chat/completions" if is_chat else "/v1/completions"
    }
    for _, body in bodies:
        assert body["temperature"] == 0.7
        assert body["n"] == 4
        assert "seed" not in body
        assert ADD.prompt in (body["messages"][0]["content"] if is_chat else body["prompt"])
