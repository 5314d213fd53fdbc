"""bench/real_answers.py after a kill: missing answers are requested, and none is stored twice."""

import importlib

import pytest
from click.testing import CliRunner

real_answers = importlib.import_module("real_answers")

SET = real_answers.PromptSet("stories", ("one", "two"), 2, 8, (real_answers.STOCK,))


def answers(text):
    return [
        real_answers.Answer(SET.name, real_answers.STOCK, prompt, number, text, 1)
        for prompt in range(2)
        for number in range(2)
    ]


@pytest.mark.parametrize(("stored", "requests"), [(0, 1), (3, 1), (4, 0)])
def test_a_partial_set_is_completed(tmp_path, monkeypatch, stored, requests):
    monkeypatch.setenv("DFTSERVE_DATA", str(tmp_path))
    monkeypatch.setattr(real_answers, "prompt_sets", lambda data: [SET])
    monkeypatch.setattr(real_answers, "engine", lambda *given, **settings: None)
    calls = []
    monkeypatch.setattr(
        real_answers, "ask", lambda *given: calls.append(given) or answers("second")
    )
    with real_answers.AnswerStore(tmp_path / "answers.jsonl", real_answers.Answer) as store:
        for answer in answers("first")[:stored]:
            store.append(answer)
    command = ["--model", str(tmp_path), "--folder", str(tmp_path)]
    done = CliRunner().invoke(real_answers.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(calls) == requests
    assert (
        real_answers.read_answers(tmp_path)
        == answers("first")[:stored] + answers("second")[stored:]
    )
