"""What is extracted from answers as models write them: tests/cases, and the folder `cases` next to
DFTSERVE_DATA."""

import json
import os
import string
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dftserve.evaluate.accuracy import extract, humaneval
from dftserve.evaluate.accuracy.humaneval import Problem
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.isolation.sandbox import Limits
from tests.cpu_time import least_seconds

CASES = Path(__file__).parent.parent / "cases"
REAL = Path(os.environ.get("DFTSERVE_DATA", "")).parent / "cases"
FUNCTIONS = json.loads((CASES / "functions.json").read_text())


def cases(name: str, real: str) -> list:
    """Our own cases, and the real ones if they are there."""
    listed = json.loads((CASES / f"{name}.json").read_text())
    path = REAL / f"{real}.json"
    if "DFTSERVE_DATA" not in os.environ or not path.is_file():
        skip = pytest.mark.skip(reason=f"no folder `cases` with {path.name} next to DFTSERVE_DATA")
        return [*listed, pytest.param({"answer": "", "right": ""}, marks=skip)]
    return [*listed, *json.loads(path.read_text())]


@pytest.mark.parametrize("case", cases("choices", "mmlu_answers"), ids=str)
def test_the_letter_is_extracted_as_a_reader_would(case):
    assert extract.choice(case["answer"]) == case["right"]


@pytest.mark.parametrize("case", cases("numbers", "gsm8k_answers"), ids=str)
def test_the_number_is_extracted_as_a_reader_would(case):
    assert extract.number(case["answer"]) == case["right"]


@pytest.mark.parametrize("case", FUNCTIONS["answers"], ids=lambda case: case["name"])
def test_the_function_is_extracted_as_a_reader_would(case):
    """Our own cases, which need no sandbox."""
    source = extract.code(case["answer"], FUNCTIONS["entry_point"], FUNCTIONS["prompt"])
    outcome = "unreadable"
    if source is not None:
        module: dict = {"__name__": "__main__"}
        try:
            exec(f"{source}\n{FUNCTIONS['test']}\ncheck({FUNCTIONS['entry_point']})", module)
            outcome = "right"
        except (AssertionError, NameError, TypeError):
            outcome = "wrong"
    assert outcome == case["outcome"]


@pytest.fixture
def _sandboxed():
    if (missing := sandbox.available()) is not None:
        pytest.skip(missing)


@pytest.mark.usefixtures("_sandboxed")
def test_real_answers_to_a_problem_pass():
    path = REAL / "humaneval_answers.json"
    if "DFTSERVE_DATA" not in os.environ or not path.is_file():
        pytest.skip("no folder `cases` with humaneval_answers.json next to DFTSERVE_DATA")
    listed = json.loads(path.read_text())
    problem = Problem("t", listed["prompt"], listed["entry_point"], "", listed["test"])
    answers = {each["name"]: each["answer"] for each in listed["right_answers"]}
    (judged,) = humaneval.judge([problem], [list(answers.values())], Limits(seconds=30))
    wrong = [name for name, each in zip(answers, judged, strict=True) if not each.passed]
    assert wrong == []


FRAMES = (
    "{}", "{}.", "({})", "**{}**", "`{}`", "$\\boxed{{{}}}$", "Answer: {}", "The answer is ({}).",
    "Let us see.\n\nThe correct option is {}.", "<think>A? B? C? D?</think>{}", "{}) is so",
)  # fmt: skip


@given(st.sampled_from("ABCD"), st.sampled_from(FRAMES))
def test_any_letter_is_read_in_any_frame(letter, frame):
    assert extract.choice(frame.format(letter)) == letter


@given(st.sampled_from("ABCDEFGHIJ"))
def test_only_letters_of_the_question_are_read(letter):
    answer = f"The answer is {letter}."
    assert extract.choice(answer) == (letter if letter in "ABCD" else None)
    assert extract.choice(answer, "ABCDEFGHIJ") == letter


RETRACTIONS = (
    " Wait, that's wrong. The answer is {}.", "\n\nCorrection: {}", " No, sorry, it's {}.",
    "\n\nActually, on second thought, {}.", " Oops. It should be {}.", "... no, {}.",
)  # fmt: skip


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"), st.sampled_from(RETRACTIONS))
def test_a_retracted_letter_is_not_read(first, second, turn):
    assert extract.choice(f"The answer is {first}.{turn.format(second)}") == second
    assert extract.choice(f"The answer is {first}. That's wrong.") is None


@given(st.integers(2, 999), st.integers(2, 999), st.sampled_from(RETRACTIONS))
def test_a_retracted_number_is_not_read(first, second, turn):
    assert extract.number(f"The answer is {first}.{turn.format(second)}") == str(second)
    assert extract.number(f"The answer is {first}. That's wrong.") is None


@given(st.integers(0, 999), st.integers(1, 999), st.sampled_from("+-*"))
def test_an_expression_is_read_as_its_value(left, right, sign):
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    for frame in ("The answer is {}", "\\boxed{{{}}}", "#### {}", "So it is {}."):
        assert extract.number(frame.format(f"{left} {sign} {right}")) == str(value)


@pytest.mark.parametrize("number", ["9" * 5000, "10^99999", "9^9^9", "1e99999", "2" * 299 + "^9"])
def test_a_huge_number_is_unreadable(number):
    assert extract.number(f"The answer is {number}") is None


@given(st.integers(-(10**9), 10**9), st.text("ab \n$.", max_size=20), st.booleans())
def test_the_last_number_is_read_whatever_the_text_before_it(number, around, marked):
    answer = f"{around} 7 {around}\n{'#### ' if marked else ''}{number}"
    assert extract.number(answer) == str(number)


@given(st.text(string.printable + "“”−é中\u202f", max_size=200))
def test_no_text_makes_extraction_fail(text):
    assert extract.choice(text) in (None, *"ABCD")
    assert extract.number(text) is None or any(map(str.isdigit, extract.number(text) or ""))
    source = extract.code(text, "add", "def add(a, b):\n")
    assert source is None or "add" in source


@pytest.mark.parametrize("answer", ["(" * 5000, "```python\n" + "[" * 5000, "x = 1 +\n" * 5000])
def test_hostile_texts_are_unreadable_without_an_error(answer):
    assert extract.code(answer, "add", "def add(a, b):\n") is None


LOOPS = [
    "1,",
    "1.5.",
    "1/",
    "√1",
    "1,000,",
    "}\n",
    "_\n",
    "*\n\n",
    "% \n",
    "```\n",
    "The answer is 1. ",
]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("read", [extract.number, extract.choice, extract.refuses])
def test_the_time_is_linear_in_a_text_that_repeats_itself(read, loop):
    """In CPU seconds; quadratic patterns take tens for 16,000 characters, some 4,000 tokens."""
    spent = {}
    for size in (4_000, 16_000):
        text = loop * (size // len(loop))
        spent[size] = least_seconds(partial(read, text))
    assert spent[16_000] < 1 + 6 * spent[4_000], spent
