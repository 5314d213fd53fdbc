"""How tuning changed accuracy: compare two reports of `evaluate accuracy` question by question.

    print(drift(Path("before.json"), Path("after.json")).render())

The answers are read from FILE.parts/ next to each report, and must be the ones it was made from.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dftserve import settings
from dftserve.bounded_files import read_json, shaped_as
from dftserve.evaluate.accuracy import parts
from dftserve.evaluate.accuracy.compare import Answered, Level, level_of, level_text, points
from dftserve.evaluate.accuracy.parts import FILES, LARGEST, Settings
from dftserve.evaluate.accuracy.run import by_kind
from dftserve.evaluate.text.thinking import CUT_NOTE

COLUMNS = (
    *("task", "diversity", "questions", "before", "after", "difference", "p"),
    *("unreadable", "cut"),
)
_ON_A_HUB = re.compile(r"[^/\\.~][^/\\]*/[^/\\]+")
_BLAKE3 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Row:
    """A task at one level of diversity."""

    task: str
    before: Level
    after: Level
    """Includes its difference from `before`, paired by question."""

    def cells(self) -> tuple[str, ...]:
        """The values of `COLUMNS`; shares are in percent."""
        shares = [
            (self.before.unreadable, self.after.unreadable),
            (self.before.cut, self.after.cut),
        ]
        return (
            self.task,
            level_text(self.after.diversity),
            str(self.after.questions),
            points(self.before.accuracy),
            points(self.after.accuracy),
            *self.after.change(),
            *(f"{100 * before:.1f} → {100 * after:.1f}" for before, after in shares),
        )


@dataclass(frozen=True)
class Drift:
    """Two models on the same questions."""

    before: str
    after: str
    """The models' names, as their servers report them."""
    rows: tuple[Row, ...]
    settings: Settings
    """Common to both reports, except for the model."""
    files: Mapping[str, Mapping[str, str]]
    """Digests of the files with the questions, by task."""
    alone: tuple[str, ...]
    """What only one report has, which is not compared."""

    def render(self) -> str:
        """A Markdown table."""
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        was_cut = any(level.cut for row in self.rows for level in (row.before, row.after))
        return f"{table}\n\n{CUT_NOTE}" if was_cut else table

    def explained(self) -> str:
        """The table with an explanation, for readers who have neither report."""
        test = ", p is McNemar's" if any(row.after.p is not None for row in self.rows) else ""
        return (
            "The same questions, with sampling, asked of the model before and after: "
            f"{_as_code(self.before)}, {_as_code(self.after)}. {self._settings_text()} Values are "
            f"in percent; intervals are 95 %, differences are paired{test}. Unreadable and cut are "
            "shares of the answers, before → after, and count as wrong.\n\n"
            f"{self.render()}\n\n"
            "The files with the questions, by their BLAKE3:\n\n"
            f"{self._digest_list()}"
        )

    def _settings_text(self) -> str:
        asked = self.settings
        limit = "All questions" if asked.limit is None else f"At most {asked.limit} questions"
        tokens = "its task's default" if asked.max_tokens is None else f"{asked.max_tokens} at most"
        form = "as chats" if asked.is_chat else "as texts to continue"
        return (
            f"{limit} of each task, {form}; answers to each: {asked.samples}; temperature: "
            f"{asked.temperature:g}; tokens of an answer: {tokens}."
        )

    def _digest_list(self) -> str:
        digests = {name: digest for each in self.files.values() for name, digest in each.items()}
        return "\n".join(f"- `{name}`: `{digest}`" for name, digest in digests.items())


def _as_code(name: str) -> str:
    """A model's name as inline Markdown code. A server chose it, so it must not leave its line or
    its backticks. Only the last part of a path is shown; ORG/NAME, as on a hub, is not a path."""
    shown = name if _ON_A_HUB.fullmatch(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    plain = "".join(mark for mark in shown if mark.isprintable() and mark != "`").strip()
    escaped = plain.replace("|", r"\|")
    return f"`{escaped or 'unnamed'}`"


@dataclass(frozen=True)
class Report:
    """The settings and files that a report of `evaluate accuracy` records."""

    settings: Settings
    grid: tuple[float, ...]
    files: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        for task, digests in self.files.items():
            if task not in FILES:
                accepted = settings.accepted_names(task, FILES)
                raise ValueError(f"files: got the task {task[:40]!r}; accepted: {accepted}.")
            if not isinstance(digests, Mapping) or not _are_digests(digests, FILES[task]):
                names = ", ".join(FILES[task])
                raise ValueError(
                    f"files.{task}: got something else; accepted: the BLAKE3 of {names}."
                )


def _are_digests(digests: Mapping[Any, Any], names: Iterable[str]) -> bool:
    return set(digests) == set(names) and all(
        isinstance(digest, str) and _BLAKE3.fullmatch(digest) for digest in digests.values()
    )


def drift(before: Path, after: Path) -> Drift:
    """Compare each task and level that both reports have.

    Raises:
        FileNotFoundError: a report or its answers are missing.
        ValueError: not a report of `evaluate accuracy`; answers that are not the report's; other
            settings; nothing in common; or not the same questions.
    """
    first, second = _read(before), _read(after)
    tasks = [task for task in first.files if task in second.files]
    levels = [level for level in first.grid if level in second.grid]
    _check_same(before, _conditions(first, tasks), after, _conditions(second, tasks))
    alone = (*_only(before, first, second), *_only(after, second, first))
    if not tasks or not levels:
        raise ValueError(
            f"{before}, {after}: no task at the same diversity in both; "
            f"{'; '.join(alone) or 'they have none'}."
        )
    rows = [row for task in tasks for level in levels for row in _rows(task, level, before, after)]
    return Drift(
        first.settings.model,
        second.settings.model,
        tuple(rows),
        first.settings,
        {task: first.files[task] for task in tasks},
        alone,
    )


def _read(path: Path) -> Report:
    stored = parts.read_report(path)
    with shaped_as(path, parts.REPORT):
        asked = {**stored["settings"]}
        content = {"grid": asked.pop("grid"), "settings": asked, "files": stored["files"]}
    report = settings.load(Report, content, f"{path}: report")
    _check_answers_of(report, path)
    return report


def _check_answers_of(report: Report, path: Path) -> None:
    """Check that the folder belongs to the report: it may be that of a later, unfinished job, or
    may not have been copied with the report."""
    folder = parts.folder_of(path)
    claims: dict[str, Mapping[str, Any]] = {parts.SETTINGS: asdict(report.settings)}
    claims |= {parts.files_name(task): digests for task, digests in report.files.items()}
    for name, content in claims.items():
        with _naming_report(path):
            claimed = read_json(folder / name, within=folder, largest=LARGEST)
        if claimed != content:
            raise ValueError(
                f"{folder} holds answers of another job than {path} ({name}); run one of the two "
                "`evaluate accuracy` jobs to its end, or copy both again."
            )


@contextmanager
def _naming_report(path: Path) -> Iterator[None]:
    """Add the report's name to the error for a missing file of its answers."""
    try:
        yield
    except FileNotFoundError as error:
        message = str(error).removesuffix(".")
        raise FileNotFoundError(
            f"{message}; {path} needs all its answers: copy {parts.folder_of(path)} too."
        ) from None


def _only(path: Path, report: Report, other: Report) -> Iterator[str]:
    """A line that lists what only this one of two reports has."""
    names = [task for task in report.files if task not in other.files]
    names += [f"diversity {level_text(each)}" for each in report.grid if each not in other.grid]
    if names:
        yield f"only {path} has {', '.join(names)}"


def _conditions(report: Report, tasks: Iterable[str]) -> dict[str, object]:
    """Everything that the answers to these tasks depend on, except the model."""
    asked = asdict(report.settings) | {task: report.files[task] for task in tasks}
    return {name: value for name, value in asked.items() if name != "model"}


def _check_same(
    before: Path, first: Mapping[str, object], after: Path, second: Mapping[str, object]
) -> None:
    for name in first:
        if first[name] != second[name]:
            raise ValueError(
                f"{name}: got {first[name]!r} in {before} and {second[name]!r} in {after}; "
                "accepted: reports of the same questions, asked with the same settings."
            )


def _rows(task: str, level: float, before: Path, after: Path) -> Iterator[Row]:
    bases, others = (_answers(task, level, path) for path in (before, after))
    if bases.keys() != others.keys():
        raise ValueError(
            f"{task} at diversity {level_text(level)}: got {', '.join(bases)} in {before} and "
            f"{', '.join(others)} in {after}; accepted: answers to the same questions."
        )
    for name, base in bases.items():
        try:
            compared = level_of(name, level, others[name], base)
        except ValueError as error:
            raise ValueError(f"{before}, {after}: {error}") from None
        yield Row(name, level_of(name, level, base, None), compared)


def _answers(task: str, level: float, path: Path) -> dict[str, tuple[Answered, ...]]:
    with _naming_report(path):
        return by_kind(task, parts.answers_of(parts.folder_of(path), task, level))
