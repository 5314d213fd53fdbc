"""What tuning did to accuracy: two reports of `evaluate accuracy` over the same questions, paired.

    print(drift(Path("before.json"), Path("after.json")).render())

The answers are read from FILE.parts/ beside each report, and must be the ones that it is of.
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
    """With its difference to `before`, question by question."""

    def cells(self) -> tuple[str, ...]:
        """What `COLUMNS` names, in points of a hundred."""
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
    """As their servers named them."""
    rows: tuple[Row, ...]
    settings: Settings
    """Those of both, but for the model."""
    files: Mapping[str, Mapping[str, str]]
    """By task the digests of the files with its questions."""
    alone: tuple[str, ...]
    """What only one report has, and is not compared."""

    def render(self) -> str:
        """A table of Markdown."""
        lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        was_cut = any(level.cut for row in self.rows for level in (row.before, row.after))
        return f"{table}\n\n{CUT_NOTE}" if was_cut else table

    def explained(self) -> str:
        """The table, and what it is of, for readers who have neither report."""
        test = ", p is McNemar's" if any(row.after.p is not None for row in self.rows) else ""
        return (
            "The same questions, with sampling, asked of the model before and after: "
            f"{_as_code(self.before)}, {_as_code(self.after)}. {self._asked()} In points of a "
            f"hundred; intervals are 95 %, differences are paired{test}. Unreadable and cut are "
            "shares of the answers, before → after, and count as not right.\n\n"
            f"{self.render()}\n\n"
            "The files with the questions, by their BLAKE3:\n\n"
            f"{self._listed()}"
        )

    def _asked(self) -> str:
        asked = self.settings
        limit = "All questions" if asked.limit is None else f"At most {asked.limit} questions"
        tokens = "as its task says" if asked.max_tokens is None else f"{asked.max_tokens} at most"
        form = "as chats" if asked.is_chat else "as texts to continue"
        return (
            f"{limit} of each task, {form}; answers to each: {asked.samples}; temperature: "
            f"{asked.temperature:g}; tokens of an answer: {tokens}."
        )

    def _listed(self) -> str:
        digests = {name: digest for each in self.files.values() for name, digest in each.items()}
        return "\n".join(f"- `{name}`: `{digest}`" for name, digest in digests.items())


def _as_code(name: str) -> str:
    """A model's name in Markdown. A server chose it: it stays on its line and in its backticks, and
    a path shows no more of the machine than its last part; ORG/NAME, as on a hub, is no path."""
    shown = name if _ON_A_HUB.fullmatch(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    plain = "".join(mark for mark in shown if mark.isprintable() and mark != "`").strip()
    escaped = plain.replace("|", r"\|")
    return f"`{escaped or 'unnamed'}`"


@dataclass(frozen=True)
class Report:
    """What `evaluate accuracy` wrote of itself."""

    settings: Settings
    grid: tuple[float, ...]
    files: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        for task, digests in self.files.items():
            if task not in FILES:
                accepted = settings.among(task, FILES)
                raise ValueError(f"files: got the task {task[:40]!r}; accepted: {accepted}.")
            if not isinstance(digests, Mapping) or not _are_digests(digests, FILES[task]):
                names = ", ".join(FILES[task])
                raise ValueError(
                    f"files.{task}: got another content; accepted: the BLAKE3 of {names}."
                )


def _are_digests(given: Mapping[Any, Any], names: Iterable[str]) -> bool:
    return set(given) == set(names) and all(
        isinstance(digest, str) and _BLAKE3.fullmatch(digest) for digest in given.values()
    )


def drift(before: Path, after: Path) -> Drift:
    """Each task and level that both reports have.

    Raises:
        FileNotFoundError: a report, or answers that it is of.
        ValueError: no report of `evaluate accuracy`; answers that are not the report's; other
            settings; nothing in common; or not the same questions.
    """
    first, second = _read(before), _read(after)
    tasks = [task for task in first.files if task in second.files]
    levels = [level for level in first.grid if level in second.grid]
    _check_same(before, _asked_of(first, tasks), after, _asked_of(second, tasks))
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
    given = parts.read_report(path)
    with shaped_as(path, parts.REPORT):
        asked = {**given["settings"]}
        content = {"grid": asked.pop("grid"), "settings": asked, "files": given["files"]}
    report = settings.load(Report, content, f"{path}: report")
    _check_answers_of(report, path)
    return report


def _check_answers_of(report: Report, path: Path) -> None:
    """The folder may be of a later job, which has not ended, or was not copied with the report."""
    folder = parts.folder_of(path)
    claims: dict[str, Mapping[str, Any]] = {parts.SETTINGS: asdict(report.settings)}
    claims |= {parts.files_name(task): digests for task, digests in report.files.items()}
    for name, content in claims.items():
        with _beside(path):
            kept = read_json(folder / name, within=folder, largest=LARGEST)
        if kept != content:
            raise ValueError(
                f"{folder} holds answers of another job than {path} tells of ({name}); run the one "
                "or the other `evaluate accuracy` to its end, or copy both anew."
            )


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """A file of the folder of answers that is not there is named, with the report that it is of."""
    try:
        yield
    except FileNotFoundError as error:
        told = str(error).removesuffix(".")
        raise FileNotFoundError(
            f"{told}; {path} is read with all its answers: copy {parts.folder_of(path)} too."
        ) from None


def _only(path: Path, report: Report, other: Report) -> Iterator[str]:
    """What only this one of two reports has."""
    names = [task for task in report.files if task not in other.files]
    names += [f"diversity {level_text(each)}" for each in report.grid if each not in other.grid]
    if names:
        yield f"only {path} has {', '.join(names)}"


def _asked_of(report: Report, tasks: Iterable[str]) -> dict[str, object]:
    """On what the answers to these tasks depend, beside the model."""
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
    theirs, ours = (_answers(task, level, path) for path in (before, after))
    if theirs.keys() != ours.keys():
        raise ValueError(
            f"{task} at diversity {level_text(level)}: got {', '.join(theirs)} in {before} and "
            f"{', '.join(ours)} in {after}; accepted: answers to the same questions."
        )
    for name, base in theirs.items():
        try:
            compared = level_of(name, level, ours[name], base)
        except ValueError as error:
            raise ValueError(f"{before}, {after}: {error}") from None
        yield Row(name, level_of(name, level, base, None), compared)


def _answers(task: str, level: float, path: Path) -> dict[str, tuple[Answered, ...]]:
    with _beside(path):
        return by_kind(task, parts.answers_of(parts.folder_of(path), task, level))
