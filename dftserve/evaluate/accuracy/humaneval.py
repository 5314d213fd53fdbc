"""HumanEval through a server: 164 functions to write, checked by their tests in the sandbox.

    problems = read(Path("HumanEval.jsonl.gz"))
    answered = measure(problems, Served(url, model), diversity=0.5, samples=4)

arXiv 2107.03374.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from dftserve.bounded_files import json_rows, lines_of, open_file, shaped_as
from dftserve.evaluate.accuracy import extract, grade, questions
from dftserve.evaluate.accuracy.compare import Answered
from dftserve.evaluate.accuracy.isolation import sandbox
from dftserve.evaluate.accuracy.isolation.sandbox import Limits
from dftserve.evaluate.accuracy.questions import Question
from dftserve.evaluate.generate.client import Served

STOPS = (
    *("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    *("\nasync def", "\n@", "\nassert", "\n```", "\n~~~", "<|"),
)
"""Strings that show that a continuation has left its function: those of arXiv 2107.03374, and for
chat models the end of a code block or a token of the template written as text."""
LARGEST = 64 << 20
"""Maximum size of a file of problems, in bytes, compressed and uncompressed."""
MAX_TOKENS = 1024
"""Maximum tokens of an answer."""
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
    "```python\n{prompt}```"
)


@dataclass(frozen=True)
class Problem:
    """One line of HumanEval.jsonl."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclass(frozen=True)
class Judged:
    """The result of one answer."""

    passed: bool
    ended: str
    """How its program ended (`sandbox.ENDS`), `grade.UNREADABLE` or `grade.CUT`."""


def read(path: Path) -> tuple[Problem, ...]:
    """The problems of a .jsonl or .jsonl.gz file.

    Raises:
        ValueError: a line is not a problem.
    """
    with open_file(path, largest=LARGEST) as stored:
        file: Any = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
        try:
            return tuple(_problems(file, path))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a gzip file ({error}).") from None


def _problems(file: BinaryIO, path: Path) -> Iterator[Problem]:
    names = [field.name for field in fields(Problem)]
    # The size of a compressed file is only known while reading it.
    for where, row in json_rows(lines_of(file, path, largest=LARGEST, longest=LARGEST), path):
        with shaped_as(where, f"lines of JSON with {', '.join(names)}"):
            problem = Problem(**{name: row[name] for name in names})
        if not all(isinstance(each, str) for each in vars(problem).values()):
            raise ValueError(f"{where}: accepted: texts in {', '.join(names)}.")
        yield problem


def measure(
    problems: Sequence[Problem],
    served: Served,
    diversity: float,
    *,
    samples: int = 1,
    saved: Path | None = None,
    limits: Limits = sandbox.LIMITS,
    unsafe: bool = False,
) -> tuple[Answered, ...]:
    """Ask for `samples` answers to each problem, and run the functions in them.

    Args:
        saved: a .jsonl to which answers are added as they arrive; problems that it has answers to
            are not asked again.

    Raises:
        ValueError: the server refuses the request.
        ServerError: the server cannot be reached, or fails.
        RuntimeError: as `judge`.
    """
    answers = ask(problems, served, diversity, samples=samples, saved=saved)
    results = judge(problems, answers, limits, unsafe=unsafe)
    return tuple(
        Answered(
            problem.task_id,
            right=tuple(each.passed for each in judged),
            said=tuple(texts),
            judged=tuple(each.ended for each in judged),
        )
        for problem, texts, judged in zip(problems, answers, results, strict=True)
    )


def ask(
    problems: Sequence[Problem],
    served: Served,
    diversity: float,
    *,
    samples: int = 1,
    saved: Path | None = None,
) -> list[list[str | None]]:
    """Answers [problem][sample], as the server gave them; `saved` as in `measure`.

    Raises:
        ValueError: the server refuses the request.
        ServerError: the server cannot be reached, or fails.
    """
    asked = [
        Question(each.task_id, INSTRUCTION.format(prompt=each.prompt), each.prompt)
        for each in problems
    ]
    return questions.ask(
        asked,
        served,
        diversity,
        samples=samples,
        max_tokens=MAX_TOKENS,
        stop=STOPS,
        saved=saved,
    )


def program(problem: Problem, source: str) -> str:
    """A module with the function and its tests, which runs to its end if all tests pass."""
    return f"{source}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def judge(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str | None]],
    limits: Limits = sandbox.LIMITS,
    *,
    unsafe: bool = False,
) -> list[list[Judged]]:
    """Run the function of every answer with its problem's tests, one program per core at a time.

    Args:
        answers: [problem][sample], each a chat answer or a continuation of the prompt.

    Raises:
        RuntimeError: the sandbox is not available, and `unsafe` is not set.
    """

    def run(pair: tuple[Problem, str | None]) -> Judged:
        problem, answer = pair
        if state := grade.cut_state(answer):
            return Judged(False, state)
        source = extract.code(answer or "", problem.entry_point, problem.prompt)
        if source is None:
            return Judged(False, grade.UNREADABLE)
        result = sandbox.run(program(problem, source), limits, unsafe=unsafe)
        return Judged(result.passed, result.ended)

    pairs = list(zip(problems, answers, strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = pool.map(run, [(each, text) for each, several in pairs for text in several])
        return [[next(judged) for _ in several] for _, several in pairs]


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, 1 − C(n−c, k)/C(n, k), unbiased (arXiv 2107.03374).

    Raises:
        ValueError: k outside 1 to n, or c outside 0 to n.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(
            f"pass@k: got k={k} with {passed} of {samples} passed; accepted: 1 ≤ k ≤ samples."
        )
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)
