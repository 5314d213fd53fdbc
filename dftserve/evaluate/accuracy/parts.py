"""The answers that belong to a report, in FILE.parts/, and what they depend on.

    with locked(folder_of(Path("accuracy.json"))) as parts:
        claim(parts, SETTINGS, asdict(settings), "settings", TASKS)
        answered = answers_of(parts, "gsm8k", 0.5)

lock                locked while a run writes to the folder; empty
settings.json       `Settings`
TASK-files.json     digests of the files with the task's questions
TASK-LEVEL.json     the graded answers to a task at a level
TASK-LEVEL.jsonl    the raw answers as they arrive, for tasks that do not run in lm-eval
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic, lock, settings
from dftserve.bounded_files import open_growing, read_json, with_advice
from dftserve.evaluate.accuracy import refusals
from dftserve.evaluate.accuracy.compare import Answered, level_text

FILES = {
    "mmlu": ("mmlu_test.jsonl", "mmlu_dev.jsonl"),
    "gsm8k": ("gsm8k_test.jsonl", "gsm8k_train.jsonl"),
    "humaneval": ("HumanEval.jsonl.gz",),
    "refusals": ("refusals.jsonl",),
}
"""The files that each task reads from the data folder."""
SETTINGS, LOCK = "settings.json", "lock"
REPORT = "a report of `dftserve evaluate accuracy`"
LARGEST = 1 << 30
"""Maximum size of a report or a file of answers, in bytes."""


@dataclass(frozen=True)
class Settings:
    """What an answer depends on in addition to its task and level; fields as in `run.Job`."""

    model: str
    temperature: float
    limit: int | None
    samples: int
    max_tokens: int | None
    is_chat: bool


def read_report(path: Path) -> Any:
    """Read a report without checking it; the caller does so within `shaped_as(path, REPORT)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON.
    """
    try:
        return read_json(path, largest=LARGEST)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: there is no such file; give what `evaluate accuracy --out FILE` wrote."
        ) from None


def folder_of(report: Path) -> Path:
    """The folder in which a report's answers are stored."""
    return report.with_name(f"{report.name}.parts")


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder, created, to which no other run writes meanwhile. Readers need no lock.

    Raises:
        ValueError: another run writes to it; or the lock is a link, or has content, or cannot be
            taken.
        OSError: the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_growing(folder / LOCK, largest=0) as file:
        lock.take_or_refuse(file, folder, writer="run", output="file")
        yield folder


def files_name(task: str) -> str:
    """The file that records which questions a task's answers belong to."""
    return f"{task}-files.json"


def answers_name(task: str, level: float) -> str:
    """The file of a task's answers at one level."""
    return f"{task}-{level_text(level)}.json"


def claim(
    folder: Path, name: str, content: Mapping[str, Any], what: str, tasks: Iterable[str]
) -> None:
    """Record what the answers to `tasks` depend on. If there are answers already, the same content
    must have been recorded for them.

    Raises:
        ValueError: there are answers with another record or none.
    """
    existing = first_answers(folder, tasks)
    if existing is not None:
        otherwise = f"remove {folder} to ask again, or choose another file"
        try:
            claimed = read_json(folder / name, within=folder, largest=LARGEST)
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds answers ({existing.name}) without {name}, which records the "
                f"{what} that they belong to; {otherwise}."
            ) from None
        except ValueError as error:
            raise ValueError(with_advice(error, otherwise)) from None
        if claimed != content:
            raise ValueError(
                f"{folder} holds answers for other {what} ({folder / name}); {otherwise}."
            )
    atomic.write_text(folder / name, json.dumps(content, indent=1))


def first_answers(folder: Path, tasks: Iterable[str]) -> Path | None:
    """A file that holds answers to one of the tasks; None if there is none."""
    return next((path for task in tasks for path in _answers(folder, task)), None)


def _answers(folder: Path, task: str) -> list[Path]:
    """The files that hold answers to a task. An empty one is ignored: the server gave no answer."""
    return [
        path
        for path in sorted(folder.glob(f"{task}-*"))
        if path.suffix in (".json", ".jsonl") and path.name != files_name(task)
        if path.lstat().st_size
    ]


def save(folder: Path, task: str, level: float, answered: Sequence[Answered]) -> None:
    """Write a task's answers at one level; the file appears whole or not at all."""
    text = json.dumps([asdict(each) for each in answered], indent=1)
    atomic.write_text(folder / answers_name(task, level), text)


def answers_of(folder: Path, task: str, level: float) -> tuple[Answered, ...]:
    """The answers to a task at a level.

    Raises:
        FileNotFoundError: there is no file of them.
        ValueError: the file was not written by `save`.
    """
    path = folder / answers_name(task, level)
    try:
        rows = read_json(path, within=folder, largest=LARGEST)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: got another content; accepted: a list of answers.")
        return tuple(
            _answered(row, task, f"{path}, question {number}") for number, row in enumerate(rows)
        )
    except ValueError as error:
        advice = "remove it and run that `evaluate accuracy` again, or copy it again"
        raise ValueError(with_advice(error, advice)) from None


def _answered(row: object, task: str, where: str) -> Answered:
    answered = settings.load(Answered, row, where)
    counts = [len(each) for each in (answered.right, answered.said, answered.judged)]
    if not counts[0] or len(set(counts)) > 1:
        raise ValueError(
            f"{where}: got {', '.join(map(str, counts))} of right, said, judged; accepted: the "
            "same number of each, at least one."
        )
    if task == "refusals" and refusals.kind_of(answered.question) not in refusals.KINDS:
        raise ValueError(
            f"{where}: got the name {answered.question[:40]!r}; accepted: one that begins with "
            f"{' or '.join(f'{kind}/' for kind in refusals.KINDS)}."
        )
    return answered
