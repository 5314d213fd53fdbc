"""The commands around an evaluation: judge, blind test, likelihood, benchmark."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.evaluate import reference
from dftserve.evaluate import run as evaluation
from dftserve.evaluate.benchmark import run as benchmark
from dftserve.evaluate.benchmark.tasks import Task
from dftserve.evaluate.generate.grid import RequestGrid, generate
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.evaluate.text.windows import Sample
from dftserve.openai_client import Server
from tests.local_server import in_force, reply, serving
from tests.texts import human_like
from tests.training import save_model

PROMPTS = tuple(f"Write about number {number}." for number in range(8))
DATA = os.environ.get("DFTSERVE_DATA")


def chat(answer: Callable[[dict], str | None], name: str = "fake"):
    """A server that speaks the chat API; `answer` takes the body, `name` is what it serves."""

    def handle(request) -> None:
        if request.command == "GET":
            response = {"object": "list", "data": [{"id": name, "object": "model"}]}
        else:
            body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            message = {"role": "assistant", "content": answer(body)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            response = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake"}
            response |= {"choices": [choice], **in_force(body, None)}
        reply(request, 200, json.dumps(response).encode(), **{"Content-Type": "application/json"})

    return serving(handle)


def run(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An evaluation's answers, people's answers to the same prompts, and anchors."""
    folder = tmp_path_factory.mktemp("commands")
    texts = dict(zip(PROMPTS, human_like(8, seed=3), strict=True))
    asking = RequestGrid("fake", tuple(map(Prompt, PROMPTS)), (0.0, 0.5), 1)
    with chat(lambda body: texts[body["messages"][-1]["content"]]) as url:
        server = Server(f"{url}/v1")
        generate(
            asking, folder / "out", server=server, concurrency=2, tick=lambda done, total: None
        )
    people = zip(PROMPTS, human_like(8, seed=4), strict=True)
    lines = [json.dumps({"prompt": prompt, "response": text}) for prompt, text in people]
    (folder / "people.jsonl").write_text("\n".join(lines))
    reference.save(reference.build([Sample(text) for text in human_like(96)]), folder / "anchors")
    return folder


# ── Stored answers ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def evaluated(folder, tmp_path, monkeypatch):
    """A function that runs `dftserve evaluate MODEL` into one folder, and the models served for it.
    MODEL is a checkpoint; a stub server answers for it."""
    texts = dict(zip(PROMPTS, human_like(8, seed=3), strict=True))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    served = []

    @contextmanager
    def running(model, *flags, log):
        served.append(model)
        with chat(lambda body: texts[body["messages"][-1]["content"]]) as url:
            yield SimpleNamespace(url=f"{url}/v1")

    def run_it(model, *more):
        words = ("--prompts", tmp_path / "prompts.txt", "--anchors", folder / "anchors")
        return run(model, *words, "--out", tmp_path / "out", "--grid", "0", "--samples", 1, *more)

    monkeypatch.setattr(evaluation, "running", running)
    return run_it, served


def table(done) -> list[str]:
    """The measurements, without the time they took."""
    return done.stdout.splitlines()[2:]


def test_stored_answers_of_another_model_are_refused(evaluated, tmp_path):
    """Stored answers are measured without serving the model again. Those of another model,
    of another name or of other weights in the same folder are refused."""
    run_it, served = evaluated
    base, tuned = save_model(tmp_path / "base"), save_model(tmp_path / "tuned")
    first = run_it(base)
    assert first.exit_code == 0, first.output
    again = run_it(base)
    assert again.exit_code == 0, again.output
    assert table(again) == table(first)
    assert served == [str(base)]
    assert "is not known" not in first.output + again.output
    for other, message in (
        (run_it(tuned), f"model '{base}' (now '{tuned}')"),
        (run_it(base, "--model", "adapter"), f"model '{base}' (now 'adapter')"),
    ):
        assert (other.exit_code, message in other.output) == (2, True), other.output
    save_model(tmp_path / "base", seed=1)  # As training to the same folder does.
    retrained = run_it(base)
    assert retrained.exit_code == 2
    assert "answers of other weights" in retrained.output
    assert "another folder" in retrained.output
    assert served == [str(base)], "no server is started for a refused run"


def test_answers_without_recorded_weights_stay_readable(evaluated, tmp_path):
    run_it, served = evaluated
    base = save_model(tmp_path / "base")
    run_it(base)
    asked = json.loads((tmp_path / "out" / "asked.json").read_text())
    del asked["weights"]
    (tmp_path / "out" / "asked.json").write_text(json.dumps(asked))
    found = run_it(base)
    assert found.exit_code == 0, found.output
    assert found.output.count("is not known") == 1
    assert served == [str(base)]


def test_a_model_whose_weights_cannot_be_identified_is_evaluated_with_a_warning(
    evaluated, tmp_path
):
    run_it, _ = evaluated
    base = save_model(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    found = run_it(base)
    assert found.exit_code == 0, found.output
    assert f"{base}: its weights cannot be identified" in found.output


def test_the_model_that_a_url_serves_now_is_checked(evaluated):
    run_it, _ = evaluated
    text = human_like(1)[0]
    with chat(lambda body: f"{body['messages']} {text}") as url:
        first = run_it(url)
        assert first.exit_code == 0, first.output
    with chat(lambda body: pytest.fail("a request was sent"), "another") as url:
        other = run_it(url)
        assert (other.exit_code, "model 'fake' (now 'another')" in other.output) == (2, True)
        named = run_it(url, "--model", "fake")
        assert (named.exit_code, table(named)) == (0, table(first))
    stopped = run_it(url)
    assert (stopped.exit_code, table(stopped)) == (0, table(first))
    assert "Whether it still serves fake is not known" in stopped.output


def test_the_benchmark_refuses_answers_of_other_weights(tmp_path, monkeypatch):
    prompt = Prompt("Describe it.", about={"meaning": "name[Zizzi], area[riverside]"})
    human = [Sample(f"Zizzi, {each}, is by the riverside.", prompt.text) for each in "abcdefgh"]
    task = Task("Meaning", "", "meaning", (prompt,), tuple(human), 0, 16, 64)

    @contextmanager
    def running(model, *flags, log):
        with chat(lambda body: human[body["seed"] % 8].text, model) as url:
            yield SimpleNamespace(url=f"{url}/v1")

    monkeypatch.setattr(evaluation, "running", running)
    monkeypatch.setattr(benchmark.tasks, "load", lambda name, data: task)
    base = save_model(tmp_path / "base")
    job = benchmark.Job(model=str(base), out=tmp_path / "out", tasks=("e2e",), grid=(0.0,))
    lines: list[str] = []
    benchmark.run(job, lines.append, lambda *_: None)
    benchmark.run(job, lines.append, lambda *_: None)
    assert [line for line in lines if "16 answers are there" in line] == [
        f"{tmp_path / 'out' / 'e2e'}: {there} of 16 answers are there." for there in (0, 16)
    ]
    save_model(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="answers of other weights"):
        benchmark.run(job, lines.append, lambda *_: None)


# ── Judges, people, likelihood, benchmark ────────────────────────────────────────────────────────


def test_a_judge_that_always_answers_a_finds_parity(folder):
    with chat(lambda body: "Thought.\nA") as url:
        words = ("judge", folder / "out", "--human", folder / "people.jsonl", "--url", f"{url}/v1")
        judged = run(*words, "--judge", "fake", "--json")
    assert judged.exit_code == 0, judged.output
    found = json.loads(judged.stdout)
    assert (found["jmq"]["value"], found["flips"]["value"], found["pairs"]) == (50, 100, 8)


def test_judge_refuses_wrong_inputs(folder, tmp_path):
    human = ("--human", folder / "people.jsonl", "--url", "http://127.0.0.1:1/v1", "--judge", "x")
    assert "asked.json" in run("judge", tmp_path, *human).output
    assert "one of 0.0, 0.5" in run("judge", folder / "out", *human, "--diversity", ".7").output
    (tmp_path / "others.jsonl").write_text(json.dumps({"text": human_like(1)[0]}))
    other = run("judge", folder / "out", "--human", tmp_path / "others.jsonl", *human[2:])
    assert "`prompt`" in other.output


def test_a_blind_test_from_page_to_verdict(folder, tmp_path):
    page = tmp_path / "test.html"
    words = ("blind", "page", folder / "out", "--human", folder / "people.jsonl", "--html", page)
    made = run(*words, "--seed", "11")
    assert made.exit_code == 0, made.output
    assert "8 trials" in made.output
    html, key = page.read_text(), json.loads(Path(f"{page}.key.json").read_text())
    assert all(trial in html for trial in key["human"])
    nothing = run("blind", "verdict", f"{page}.key.json", page)
    assert nothing.exit_code == 2
    assert run(*words, "--seed", "11").exit_code != 0, "an existing test is not overwritten"


def test_likelihood_of_people_and_of_answers(folder, tmp_path):
    """The tokenizer has none of the words: all become the same token, equally likely."""
    words = ("likelihood", save_model(tmp_path / "model"), "--anchors", folder / "anchors")
    alone = run(*words)
    assert alone.exit_code == 0, alone.output
    assert "bits per byte" in alone.output
    with_answers = run(*words, "--answers", folder / "out", "--json")
    found = json.loads(with_answers.stdout)
    assert [level for level, _ in found["answers"]] == [0.0, 0.5]
    (_, first), (_, second) = found["answers"]
    assert first == second, "the same texts at both diversities"


@pytest.mark.skipif(DATA is None, reason="DFTSERVE_DATA is not set")
def test_the_benchmark_runs_each_task_and_skips_those_without_data(tmp_path):
    texts = human_like(200, seed=5)

    def answer(body: dict) -> str:
        prompt = body["messages"][-1]["content"]
        if "place to eat" in prompt:
            return "There is a nice place near the river that serves good food to families."
        return texts[body["seed"] % len(texts)]

    out = tmp_path / "sdb"
    with chat(answer) as url:
        words = ("benchmark", url, "--out", out, "--grid", "0,.5", "--limit", "16")
        done = run(*words, "--tasks", "story,e2e")
    assert done.exit_code == 0, done.output
    assert (out / "story" / "report.html").is_file()
    people, off, _ = json.loads((out / "e2e" / "meaning.json").read_text())
    assert people["slot_errors"]["value"] < 0.2 < 0.5 < off["slot_errors"]["value"]
    assert off["wording"]["value"] == 0, "the same sentence every time"
    if find_spec("matplotlib"):
        again = run(*words, "--tasks", "story", "--plots", tmp_path / "plots")
        assert again.exit_code == 0, again.output
        assert (tmp_path / "plots" / "story" / "distance.png").is_file()
    skipped = run("benchmark", "http://127.0.0.1:1", "--out", out, "--data", tmp_path)
    assert skipped.exit_code == 2, "nothing was measured"
    assert skipped.output.count("skipped") == 3
    assert "none has its texts" in skipped.output


@pytest.mark.parametrize(
    ("samples", "people", "message"),
    [(4, 8, "samples: got 4; accepted: 8 or more"), (8, 7, "none of its 1 prompts has 8 human")],
)
def test_too_few_wordings_are_refused_before_any_answer(
    tmp_path, monkeypatch, samples, people, message
):
    prompt = Prompt("Describe it.", about={"meaning": "name[Zizzi]"})
    human = tuple(Sample(f"Zizzi is number {n} here.", prompt.text) for n in range(people))
    task = Task("Meaning", "", "meaning", (prompt,), human, 0, 16, 64)
    monkeypatch.setattr(benchmark.tasks, "load", lambda name, data: task)
    with chat(lambda body: pytest.fail("a request was sent")) as url:
        job = benchmark.Job(model=url, out=tmp_path, tasks=("e2e",), samples=samples)
        with pytest.raises(ValueError, match=message):
            benchmark.run(job, lambda _: None, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_anchors_of_other_human_texts_are_refused(tmp_path):
    human = tuple(Sample(text) for text in human_like(70))
    task = Task("Style", "", "style", (Prompt("Write."),), human, 120, 8, 64)
    benchmark._write_anchors(tmp_path, task)
    benchmark._write_anchors(tmp_path, replace(task, human=human[::-1]))
    for changed in (replace(task, human=human[1:]), replace(task, words=100)):
        with pytest.raises(ValueError, match=r"anchors: built from other human texts.*--out"):
            benchmark._write_anchors(tmp_path, changed)


def test_tasks_of_the_same_name_are_refused(tmp_path):
    """They would share a folder, and only the last one would run."""
    with pytest.raises(ValueError, match=r"more than one is named 'mine'; accepted"):
        benchmark.Job(model="m", out=tmp_path, tasks=("a/mine.yaml", "story", "b/mine.yml"))


def test_the_slot_error_rate_leaves_out_answers_cut_in_their_thinking(tmp_path):
    """A cut answer has no slots to check; if all answers were cut, that is an error."""
    prompt = Prompt("Describe it.", about={"meaning": "name[Zizzi], area[riverside]"})
    human = [Sample(f"Zizzi, {each}, is by the riverside.", prompt.text) for each in "abcdefgh"]
    task = Task("Meaning", "", "meaning", (prompt,), tuple(human), 0, 16, 64)

    def measured(name: str, contents: list[str | None]) -> str:
        with chat(lambda body: contents.pop()) as url:
            job = benchmark.Job(model=url, out=tmp_path / name, grid=(0.0,), concurrency=1)
            return benchmark._meaning(job, "e2e", task, lambda _: None, lambda *_: None)

    lines = measured("some", [*(sample.text for sample in human), *[None] * 8]).splitlines()
    assert [line.split()[-1] for line in (lines[0], lines[2])] == ["cut", "8"]
    assert lines[-1] == CUT_NOTE
    found = json.loads((tmp_path / "some" / "e2e" / "meaning.json").read_text())[1]
    assert found["slot_errors"]["value"] == 0
    with pytest.raises(ValueError, match=r"diversity 0: all 16 .*max-tokens"):
        measured("none", [None] * 16)


def test_accuracy_refuses_wrong_options_before_any_request(tmp_path):
    out = ("--out", tmp_path / "accuracy.json", "--data", tmp_path)
    assert "0 among them" in run("accuracy", "http://127.0.0.1:1", *out, "--grid", ".5").output
    assert "humaneval" in run("accuracy", "http://127.0.0.1:1", *out, "--tasks", "humanevil").output


def test_prompts_are_read_once(folder, tmp_path, monkeypatch):
    """Validation, requests and the report use one reading of the file."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    read, reads = evaluation.read_prompts, []
    monkeypatch.setattr(evaluation, "read_prompts", lambda path: reads.append(path) or read(path))
    words = ("--prompts", prompts, "--anchors", folder / "anchors", "--out", tmp_path / "out")
    result = run("run", "http://127.0.0.1:1", *words)
    assert "is the server running" in result.output
    assert reads == [prompts]


def test_answers_that_can_hardly_be_long_enough_are_warned_of_before_the_first(folder, tmp_path):
    """The anchors' texts have 120 words, some 156 tokens."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    files = ("--prompts", tmp_path / "prompts.txt", "--anchors", folder / "anchors")
    words = ("run", "http://127.0.0.1:1", *files, "--out", tmp_path / "out", "--max-tokens")
    warning = "Warning: of answers of at most 130 tokens few have the 120 words of the anchors"
    assert warning in run(*words, 130).output
    assert "Warning" not in run(*words, 200).output


def test_the_plots_of_the_report_are_also_written_as_files(folder, tmp_path):
    """No server is needed: the answers are stored."""
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'dftserve[plots]'")
    out, plots = tmp_path / "out", tmp_path / "plots"
    shutil.copytree(folder / "out", out)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    share = {"value": 0.5, "low": 0.4, "high": 0.6, "left_out": []}
    task = {"task": "mmlu", "levels": [{"diversity": 0, "accuracy": share}]}
    content = {"settings": {"model": "fake", "temperature": 1.0}, "tasks": [task]}
    (tmp_path / "accuracy.json").write_text(json.dumps(content))
    words = ("http://127.0.0.1:9", "--prompts", tmp_path / "prompts.txt", "--out", out)
    words += ("--anchors", folder / "anchors", "--grid", "0,.5", "--samples", 1)
    found = run(*words, "--accuracy", tmp_path / "accuracy.json", "--plots", plots)
    assert found.exit_code == 0, found.output
    assert "Whether it still serves fake is not known" in found.output
    titled = re.findall(r'<title id="([^"]*)-title"', (out / "report.html").read_text())
    assert {path.name for path in plots.iterdir()} == {f"{name}.png" for name in titled}
    assert titled == ["distance", "quality", "accuracy", "ai-phrases", "not-x-but-y"]
    found = run(*words, "--accuracy", tmp_path / "none.json")
    assert (found.exit_code, "evaluate accuracy --out FILE" in found.output) == (1, True)


def test_the_variable_given_for_the_key_must_be_set(folder, tmp_path, monkeypatch):
    """In every command that calls a server; without it no request is sent."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    (tmp_path / "refusals.jsonl").write_text('{"prompt": "Hello?", "refuse": false}\n')
    url = "http://127.0.0.1:1"
    out = ("--out", tmp_path / "out")
    human = ("--human", folder / "people.jsonl", "--url", url, "--judge", "x")
    for words in (
        ("run", url, "--prompts", prompts, "--anchors", folder / "anchors", *out),
        ("judge", folder / "out", *human, "--words", "80"),
        ("accuracy", url, *out, "--data", tmp_path, "--tasks", "refusals"),
    ):
        refused = run(*words, "--api-key-env", "NO_SUCH_KEY")
        assert refused.exit_code == 2, refused.output
        assert "NO_SUCH_KEY holds no API key" in refused.output
