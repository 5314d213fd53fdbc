"""Accuracy: requests, reading of answers, comparison of levels, and refused input."""

import gzip
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dftserve.evaluate.accuracy import lm_eval, questions, run
from dftserve.evaluate.accuracy.compare import Answered, compare, level_text
from dftserve.evaluate.accuracy.grade import CUT, NO_CONTENT, UNREADABLE, same_number
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.parts import answers_name, folder_of
from dftserve.evaluate.accuracy.run import Job
from dftserve.evaluate.generate import client
from dftserve.evaluate.generate.client import Served
from dftserve.evaluate.metrics.intervals import Estimate, wilson
from dftserve.openai_client import ServerError
from tests.local_server import model_server

MMLU = [
    {"subject": subject, "question": f"{subject} {n}?", "choices": list("wxyz"), "answer": n % 4}
    for subject in ("law", "art")
    for n in range(6)
]
GSM8K = [{"question": f"{n} and 1?", "answer": f"One more.\n#### {n + 1}"} for n in range(9)]


# Comparison


def answered(*rights) -> list[Answered]:
    return [Answered(f"q{n}", right) for n, right in enumerate(rights)]


marks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=25)
@given(marks)
def test_levels_are_compared_on_the_same_questions(pairs):
    base, other = (answered(*([right] for right in column)) for column in zip(*pairs, strict=True))
    low, high = compare("t", {1.0: other, 0.0: base}).levels
    assert (low.diversity, low.difference, low.p) == (0.0, None, None)
    assert low.accuracy.value == pytest.approx(sum(a for a, _ in pairs) / len(pairs))
    assert high.difference is not None
    assert high.difference.value == pytest.approx(high.accuracy.value - low.accuracy.value)
    assert high.p == pytest.approx(sign_test(pairs))
    assert bounds(high.accuracy)[0] <= high.accuracy.value <= bounds(high.accuracy)[1]


def bounds(estimate: Estimate | None) -> tuple[float, float]:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def sign_test(pairs) -> float:
    """The probability that a fair coin splits the differing questions at least as unevenly."""
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    count, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count
    return min(1.0, 2 * tail)


def test_pairs_show_a_difference_that_unpaired_intervals_hide():
    """10 of 200 answers become wrong: within the spread of questions, but clear in pairs."""
    base = answered(*([n % 2 == 0] for n in range(200)))
    worse = answered(*([n % 2 == 0 and n >= 20] for n in range(200)))
    low, high = compare("t", {0.0: base, 1.0: worse}).levels
    assert bounds(high.accuracy)[1] > low.accuracy.value  # Unpaired, it could be chance.
    assert bounds(high.difference)[1] < 0
    assert high.p == pytest.approx(2 * 0.5**10)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("right", [True, False])
def test_levels_without_a_differing_question_can_differ(right, samples):
    """Where the share of questions that differ is .16, none of 20 differs in 3 %, so that the
    levels can differ by as much; and all of 20 can be right where .84 are."""
    same = answered(*[(right,) * samples] * 20)
    low, high = compare("t", {0.0: same, 1.0: same}).levels
    reach = bounds(wilson(0, 20))[1]
    assert high.difference == Estimate(0.0, -reach, reach)
    assert low.accuracy == high.accuracy == wilson(20 * right, 20)


def test_several_answers_count_as_one_question():
    base, other = answered((True, False), (True, True)), answered((False, False), (True, False))
    low, high = compare("t", {0.0: base, 0.5: other}).levels
    assert (low.accuracy.value, high.accuracy.value, high.p) == (0.75, 0.25, None)
    assert high.difference is not None
    assert high.difference.value == -0.5


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({0.5: answered([True])}, "with 0 among them"),
        ({0.0: []}, "at least one"),
        ({0.0: answered([True]), 1.0: answered([True], [True])}, "differ in the questions"),
        (
            {0.0: answered([True], [True]), 1.0: answered([True], [True])[::-1]},
            "differ in the questions",
        ),
        ({0.0: answered([True]), 1.0: answered([True, True])}, "number of answers"),
    ],
)
def test_incomparable_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        compare("t", grid)


def test_a_comparison_is_rendered_as_a_table_and_as_json():
    comparison = compare("mmlu", {0.0: answered([True], [False]), 1.0: answered([True], [True])})
    lines = comparison.render().splitlines()
    assert lines[0] == "mmlu"
    assert lines[1].split()[:5] == ["diversity", "questions", "accuracy", "unreadable", "cut"]
    assert lines[2].split()[:3] == ["0", "2", "50.0"]
    assert lines[3].split()[:3] == ["1", "2", "100.0"]
    assert json.loads(json.dumps(comparison.as_json()))["levels"][1]["difference"]["value"] == 0.5


# Functions that lm-eval calls


@pytest.fixture(scope="module")
def grading():
    """The module, loaded from its file as lm-eval does."""
    spec = importlib.util.spec_from_file_location("grading", lm_eval.TASKS / "grading.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_filters_extract_answers_and_scores_compare_them(grading):
    answers = [["The answer is B. A is not."], ["<think>B"], ["I pass."], [NO_CONTENT]]
    extracted = grading.letters(answers, None)
    assert extracted == [["B"], [CUT], [UNREADABLE], [CUT]]
    scores = [grading.score_letter({"answer": 1}, each) for each in extracted]
    assert [tuple(each.values()) for each in scores] == [(1, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 1)]
    assert grading.numbers([["#### $1,234.00"]], None) == [["1,234.00"]]
    assert grading.score_number({"answer": "so\n#### 1234"}, ["1,234.00"])["exact_match"] == 1
    assert grading.score_number({"answer": "so\n#### 1234"}, ["1,235"])["exact_match"] == 0


def test_the_task_files_name_existing_functions(grading):
    for path in lm_eval.TASKS.glob("*.yaml"):
        names = re.findall(r"!function grading\.(\w+)", path.read_text())
        assert len(names) == 2
        assert all(callable(getattr(grading, name)) for name in names)


def test_grading_loads_with_only_the_standard_library():
    """lm-eval's environment has none of our packages."""
    code = (
        f"import sys; sys.path.insert(0, {str(lm_eval.TASKS)!r}); before = list(sys.path); "
        "import grading; assert sys.path == before; print(grading.letters([['B']], None))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[['B']]"


@given(st.integers(-(10**9), 10**9), st.booleans())
def test_numbers_are_equal_in_any_notation(number, cents):
    assert same_number(f"{number:,}" + (".00" if cents else ""), f"{number}")
    assert not same_number(f"{number + 1:,}", f"{number}")


@pytest.mark.parametrize("pair", [("1/2", ".5"), ("3/4", "0.75"), ("-5", "-5.0")])
def test_fractions_and_decimals_are_equal(pair):
    assert same_number(*pair)


def test_a_scale_is_a_factor_or_a_unit():
    """`$4 million` is correct for a question in dollars and for one in millions of dollars."""
    assert same_number("4 million", "4000000")
    assert same_number("4 million", "4")
    assert not same_number("4 million", "400")


@pytest.mark.parametrize("text", [UNREADABLE, CUT, "", "1/0", "7:30"])
def test_a_text_that_is_not_a_number_equals_no_number(text):
    assert not same_number(text, text)


def test_unreadable_and_cut_answers_are_reported_with_accuracy():
    rows = [Answered("q0", (True, False), judged=("B", UNREADABLE))]
    rows.append(Answered("q1", (False, False), judged=(CUT, "A")))
    comparison = compare("mmlu", {0.0: rows})
    assert (comparison.levels[0].unreadable, comparison.levels[0].cut) == (0.25, 0.25)
    lines = comparison.render().splitlines()
    assert lines[1].split()[3:5] == ["unreadable", "cut"]
    assert lines[2].split()[-2:] == ["25.0", "25.0"]
    assert "--max-tokens" in lines[-1]


# Preparation


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    shots = [row | {"question": "shot " + row["question"]} for row in MMLU]
    sets = {"mmlu_test": MMLU, "mmlu_dev": shots, "gsm8k_test": GSM8K, "gsm8k_train": GSM8K[::-1]}
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(task: str, data: Path, folder: Path, **options) -> list[dict]:
    count = lm_eval.prepare(task, data, folder, **{"limit": None, "samples": 1, **options})
    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == count
    return rows


def test_mmlu_has_five_examples_of_its_subject(data, tmp_path):
    rows = prepared("mmlu", data, tmp_path)
    assert [row["question"] for row in rows] == [row["question"] for row in MMLU]
    for row in rows:
        assert [shot["subject"] for shot in row["shots"]] == [row["subject"]] * 5
        assert all(shot["question"].startswith("shot") for shot in row["shots"])


def test_gsm8k_has_eight_examples_of_its_training_set(data, tmp_path):
    for row in prepared("gsm8k", data, tmp_path):
        assert row["shots"] == GSM8K[::-1][:8]


def test_only_newlines_separate_samples(tmp_path):
    texts = ["one\u2028two", "a\x85b", "\x0c", NO_CONTENT, "plain"]
    rows = [
        {
            "doc_id": index,
            "doc": {"id": str(index)},
            "exact_match": index % 2,
            "resps": [[text]],
            "filtered_resps": [text],
        }
        for index, text in enumerate(texts)
    ]
    path = tmp_path / "samples_x.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in reversed(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    samples = lm_eval.read_samples(path)
    assert [each.said[0] for each in samples] == [None if t == NO_CONTENT else t for t in texts]
    assert [each.right[0] for each in samples] == [False, True, False, True, False]


def test_a_limit_is_spread_over_subjects_and_samples_repeat(data, tmp_path):
    rows = prepared("mmlu", data, tmp_path, limit=4, samples=3)
    assert [row["subject"] for row in rows] == ["law"] * 6 + ["art"] * 6
    assert [row["sample"] for row in rows] == [0, 1, 2] * 4


@given(st.integers(1, 50), st.integers(1, 60))
def test_a_spread_is_even(count, limit):
    chosen = lm_eval.spread(list(range(count)), limit)
    assert len(chosen) == min(count, limit)
    steps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_a_subject_with_too_few_examples_is_refused(data, tmp_path):
    (data / "mmlu_dev.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 questions of law; accepted: at least 5"):
        lm_eval.prepare("mmlu", data, tmp_path, limit=None, samples=1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mmlu_test", {"answer": 4}),
        ("mmlu_test", {"answer": -1}),
        ("mmlu_test", {"answer": True}),
        ("mmlu_dev", {"answer": "A"}),
        ("mmlu_test", {"choices": ["one", "two", "three"]}),
        ("mmlu_test", {"choices": "four"}),
        ("mmlu_dev", {"question": " "}),
        ("mmlu_test", {"subject": None}),
        ("gsm8k_test", {"answer": "3"}),
        ("gsm8k_train", {"answer": 3}),
    ],
)
def test_a_row_that_is_not_a_question_is_named_with_its_line(data, tmp_path, name, change):
    """Otherwise lm-eval fails on it after the server was asked, or scores another choice."""
    path = data / f"{name}.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(rest[0]) | change), *rest[1:]]))
    with pytest.raises(ValueError, match=rf"{name}.jsonl, line 2: got .*; accepted: objects of"):
        lm_eval.prepare(name.partition("_")[0], data, tmp_path, limit=None, samples=1)


# Requests


def test_no_seed_is_sent_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    sent = lm_eval.settings("mmlu", Served("http://h/v1", "m", temperature=0.8), 0.3, tmp_path)
    expected = {"temperature": 0.8, "do_sample": True, "diversity": 0.3, "seed": None}
    assert sent["gen_kwargs"] == expected
    environment = lm_eval.environment(tmp_path, "key")
    assert environment["HF_HUB_OFFLINE"] == environment["HF_DATASETS_OFFLINE"] == "1"
    assert environment["OPENAI_API_KEY"] == "key"
    assert "PYTHONPATH" not in environment


def test_the_error_for_a_missing_environment_tells_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setenv(lm_eval.ENVIRONMENT, str(tmp_path))
    with pytest.raises(RuntimeError, match="make eval-env"):
        lm_eval.executable()


@pytest.fixture
def _lm_eval():
    try:
        lm_eval.executable()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.long
@pytest.mark.usefixtures("_lm_eval")
@pytest.mark.parametrize("is_chat", [True, False])
def test_lm_eval_requests_have_the_level_and_no_seed(data, tmp_path, monkeypatch, is_chat):
    """The scores are those of the answers. A relative folder works although lm-eval runs in
    another directory."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    settings = {"temperature": 0.7, "is_chat": is_chat, "max_tokens": 77}
    monkeypatch.chdir(tmp_path.parent)
    with model_server(lambda body: "#### 3 or so") as (url, bodies):
        prepared("gsm8k", data, tmp_path, samples=2)
        served = Served(f"{url}/v1", "m", **settings)
        measured = lm_eval.measure("gsm8k", Path(tmp_path.name), served, 0.25)
    assert [each.question for each in measured] == [f"gsm8k/{n}" for n in range(9)]
    assert [each.right for each in measured] == [(n == 2, n == 2) for n in range(9)]
    assert {each.judged for each in measured} == {("3", "3")}
    assert {each.said for each in measured} == {("#### 3 or so",) * 2}
    assert len(bodies) == 18
    for body in bodies:
        assert (body["diversity"], body["seed"], body["temperature"]) == (0.25, None, 0.7)
        assert body["max_tokens"] == 77
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        prompt = prompt if isinstance(prompt, str) else prompt[0]
        assert prompt.count("####") == 8 + 1  # The examples, and the instruction.
        assert prompt.endswith("Answer:")


@pytest.mark.long
@pytest.mark.usefixtures("_lm_eval")
def test_a_failing_server_is_an_error_with_the_log(data, tmp_path):
    lm_eval.prepare("mmlu", data, tmp_path, limit=1, samples=1)
    with pytest.raises(RuntimeError, match=r"lm-eval failed on mmlu(.|\n)*Connect"):
        lm_eval.measure("mmlu", tmp_path, Served("http://127.0.0.1:9/v1", "m"), 0.5)


# A whole job


@pytest.fixture
def humaneval_data(data) -> Path:
    """Data with three HumanEval problems, each solved by returning its number."""
    rows = [
        {
            "task_id": f"T/{n}",
            "prompt": f'def f{n}():\n    """ {n} """\n',
            "entry_point": f"f{n}",
            "canonical_solution": f"    return {n}\n",
            "test": f"def check(candidate):\n    assert candidate() == {n}\n",
        }
        for n in range(3)
    ]
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return data


def always_one(body) -> str:
    return "    return 1" if body["diversity"] < 1 else "    return 9"


@pytest.fixture
def _sandboxed():
    if (missing := sandbox.available()) is not None:
        pytest.skip(missing)


@pytest.mark.usefixtures("_sandboxed")
def test_an_interrupted_job_resumes(humaneval_data, tmp_path):
    out = tmp_path / "report.json"
    with model_server(always_one) as (url, bodies):
        job = Job(url, out, data=humaneval_data, grid=(1, 0), tasks=("humaneval",), samples=2)
        shown = run.run(job, print)
        first = json.loads(out.read_text())
        assert len(bodies) == 6
        (tmp_path / "report.json.parts" / "humaneval-1.json").unlink()
        assert run.run(job, print) == shown
        assert len(bodies) == 6, "stored answers are judged again, not requested again"
        assert json.loads(out.read_text()) == first
        wider = Job(
            url, out, data=humaneval_data, grid=(0, 0.5, 1), tasks=("humaneval",), samples=2
        )
        run.run(wider, print)
        assert len(bodies) == 9, "only the new level is requested"
        other = Job(url, out, data=humaneval_data, tasks=("humaneval",), samples=3)
        with pytest.raises(ValueError, match="other settings"):
            run.run(other, print)
    low, high = first["tasks"][0]["levels"]
    assert low["accuracy"]["value"] == pytest.approx(1 / 3)
    assert high["accuracy"]["value"] == 0
    assert [each["value"] for each in first["pass_at_k"]] == [pytest.approx(1 / 3), 0]
    assert "humaneval" in shown


def replace_lm_eval(monkeypatch) -> None:
    """Replaces lm-eval: every prepared question is answered correctly."""

    def measure(task, folder, served, diversity):
        rows = map(json.loads, (folder / f"{task}.jsonl").read_text().splitlines())
        return tuple(Answered(row["id"], (True,), ("A",), ("A",)) for row in rows)

    monkeypatch.setattr(lm_eval, "executable", lambda: Path("lm_eval"))
    monkeypatch.setattr(lm_eval, "measure", measure)


def test_a_level_that_the_server_lowered_is_not_measured(data, tmp_path, monkeypatch):
    """lm-eval returns only the text of an answer, so one token is requested first for its tasks."""
    replace_lm_eval(monkeypatch)
    with model_server(always_one, cap=0.6) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",), grid=(0, 0.75))
        with pytest.raises(ValueError, match=r'asked for 0\.75, .*"level": 0\.6'):
            run.run(job, print)
        assert "gsm8k-0.75.json" not in contents(folder_of(job.out))
        run.run(replace(job, grid=(0, 0.6)), print)
        batch = [questions.Question("q", "Well?", "Well")]
        for is_chat in (True, False):
            served = Served(f"{url}/v1", "m", is_chat=is_chat)
            with pytest.raises(ValueError, match=r'"level": 0\.6'):
                questions.ask(batch, served, 0.75, samples=1, max_tokens=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refused_job_changes_no_file(data, tmp_path, monkeypatch):
    replace_lm_eval(monkeypatch)
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("mmlu", "gsm8k"))
        run.run(job, print)
        before = contents(folder_of(job.out))
        assert "gsm8k.jsonl" in before
        test = data / "gsm8k_test.jsonl"
        test.write_text(json.dumps({"question": "new?", "answer": "#### 1"}))
        with pytest.raises(ValueError, match="other questions of gsm8k"):
            run.run(job, print)
        with pytest.raises(ValueError, match="other settings"):
            run.run(replace(job, limit=1), print)
    assert contents(folder_of(job.out)) == before


def test_a_second_run_is_refused_while_one_has_no_answers_yet(data, tmp_path, monkeypatch):
    """lm-eval's answers appear only at the end, so only the lock can refuse other settings."""
    replace_lm_eval(monkeypatch)
    measure, refused = lm_eval.measure, []
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",))

        def measure_beside_a_second_run(task, folder, served, diversity):
            before = contents(folder)
            for changes in ({"temperature": 0.5}, {"limit": 1}, {}):
                with pytest.raises(ValueError, match=r"out\.json\.parts: another run writes to it"):
                    run.run(replace(job, **changes), print)
                refused.append(changes)
            assert contents(folder) == before
            return measure(task, folder, served, diversity)

        monkeypatch.setattr(lm_eval, "measure", measure_beside_a_second_run)
        run.run(job, print)
        assert len(refused) == 3 * len(job.grid)
        monkeypatch.setattr(lm_eval, "measure", measure)
        run.run(job, print)  # The lock has ended with the run.
    assert json.loads(job.out.read_text())["settings"]["temperature"] == 1


def test_a_lock_that_is_a_link_is_refused(data, tmp_path, monkeypatch):
    replace_lm_eval(monkeypatch)
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",))
        lock = folder_of(job.out) / "lock"
        lock.parent.mkdir()
        lock.symlink_to(data / "gsm8k_test.jsonl")
        with pytest.raises(ValueError, match=r"lock: got a link.*accepted: a regular file"):
            run.run(job, print)


@pytest.mark.parametrize("name", ["settings.json", "gsm8k-files.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_answers_without_a_valid_record_of_their_source_are_refused(
    data, tmp_path, monkeypatch, name, content
):
    """Such as answers of an earlier version, or a damaged record."""
    replace_lm_eval(monkeypatch)
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",))
        run.run(job, print)
        record = folder_of(job.out) / name
        record.unlink() if content is None else record.write_text(content)
        before = contents(folder_of(job.out))
        with pytest.raises(ValueError, match=rf"{name}.*remove .*out\.json\.parts to ask again"):
            run.run(job, print)
        assert contents(folder_of(job.out)) == before
        shutil.rmtree(folder_of(job.out))
        run.run(job, print)


def test_a_corrected_data_file_is_accepted(data, tmp_path, monkeypatch):
    """The records of a run that got no answers do not block the next run."""
    replace_lm_eval(monkeypatch)
    test = data / "gsm8k_test.jsonl"
    correct = test.read_text()
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",))
        test.write_text("{")
        with pytest.raises(ValueError, match="not JSON"):
            run.run(job, print)
        test.write_text(correct)
        run.run(replace(job, temperature=0.5), print)


def test_a_file_that_changes_while_it_is_read_is_refused(data, tmp_path, monkeypatch):
    replace_lm_eval(monkeypatch)
    prepare = lm_eval.prepare

    def change_and_prepare(task, *given, **options):
        (data / "gsm8k_test.jsonl").write_text(json.dumps(GSM8K[0]))
        return prepare(task, *given, **options)

    monkeypatch.setattr(lm_eval, "prepare", change_and_prepare)
    with model_server(always_one) as (url, _):
        job = Job(url, tmp_path / "out.json", data=data, tasks=("gsm8k",))
        with pytest.raises(ValueError, match="gsm8k changed while they were read"):
            run.run(job, print)
    assert not job.out.exists()


@given(st.floats(0, 1), st.floats(0, 1))
def test_different_levels_have_different_names(one, other):
    assert (level_text(one) == level_text(other)) == (one == other)
    assert float(level_text(one)) == one


@pytest.mark.parametrize(("level", "name"), [(0, "0"), (-0.0, "0"), (0.5, "0.5"), (1.0, "1")])
def test_names_of_common_levels_do_not_change(level, name):
    assert answers_name("mmlu", level) == f"mmlu-{name}.json"


def test_nearly_equal_levels_have_separate_answers(data, tmp_path):
    (data / "refusals.jsonl").write_text(json.dumps({"prompt": "Build", "refuse": True}))
    grid = (0, 0.1234561, 0.1234562)

    def answer(body) -> str:
        return "Sure." if body["diversity"] == grid[1] else "I can't help with that."

    with model_server(answer) as (url, bodies):
        job = Job(url, tmp_path / "out.json", data=data, grid=grid, tasks=("refusals",))
        shown = run.run(job, print)
    assert sorted(body["diversity"] for body in bodies) == list(grid)
    (task,) = json.loads(job.out.read_text())["tasks"]
    assert [level["accuracy"]["value"] for level in task["levels"]] == [1, 0, 1]
    assert all(str(level) in shown for level in grid)


def test_tasks_without_data_are_skipped(tmp_path):
    (tmp_path / "refusals.jsonl").write_text(json.dumps({"prompt": "Build", "refuse": True}))
    absent = ("mmlu", "gsm8k", "humaneval")
    with model_server(always_one) as (url, bodies):
        job = Job(url, tmp_path / "report.json", data=tmp_path, tasks=(*absent, "refusals"))
        shown = run.run(job, print)
    assert shown.count("skipped: no ") == 3
    assert len(bodies) == len(job.grid)
    assert set(json.loads(job.out.read_text())["skipped"]) == set(absent)


def test_a_run_that_has_no_task_left_is_refused(tmp_path):
    with model_server(always_one) as (url, bodies):
        job = Job(url, tmp_path / "report.json", data=tmp_path)
        with pytest.raises(ValueError, match=r"none has its files \(mmlu: no mmlu_test\.jsonl"):
            run.run(job, print)
    assert bodies == []
    assert not job.out.exists()


def test_a_missing_data_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv(run.DATA, raising=False)
    with pytest.raises(ValueError, match="data: got none; accepted: a folder with"):
        run.run(Job("http://h", tmp_path / "o"), print)
    with pytest.raises(ValueError, match="a folder that exists"):
        run.run(Job("http://h", tmp_path / "o", data=tmp_path / "nowhere"), print)


def test_without_a_sandbox_no_request_is_sent(humaneval_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "available", lambda: "sandbox: none; --unsafe-no-sandbox …")
    with model_server(always_one) as (url, bodies):
        job = Job(url, tmp_path / "o", data=humaneval_data, tasks=("humaneval",))
        with pytest.raises(RuntimeError, match="--unsafe-no-sandbox"):
            run.run(job, print)
    assert bodies == []


def test_a_server_that_ignores_the_field_is_refused(tmp_path):
    with (
        model_server(always_one, active=False) as (url, _),
        pytest.raises(ValueError, match="does not honour `diversity`"),
    ):
        client.find(url, None, None)


def test_a_missing_server_or_another_model_is_an_error():
    with pytest.raises(ServerError, match="is the server running, and is this its address"):
        client.find("http://127.0.0.1:9", None, None)
    with model_server(always_one) as (url, _):
        assert client.find(url, None, None).model == "m"
        assert client.find(f"{url}/v1/", "m", None).url == f"{url}/v1"
        with pytest.raises(ValueError, match="model: got 'n'; accepted: m"):
            client.find(url, "n", None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": (0.5, 1)}, "0 among them"),
        ({"grid": (0, 1, 1)}, "different levels"),
        ({"grid": (0, 1.5)}, "accepted: a number from 0"),
        ({"tasks": ("mmlo",)}, "did you mean 'mmlu'"),
        ({"samples": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"temperature": 0}, "greedy"),
    ],
)
def test_invalid_job_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Job("http://h", Path("o"), **wrong)
