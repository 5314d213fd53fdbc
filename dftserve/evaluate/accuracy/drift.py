"""What tuning did to accuracy: two reports of `evaluate accuracy` over the same questions, paired.

    print(drift(Path("before.json"), Path("after.json")).render())

The answers are read from FILE.parts/ beside each report.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.bounded_files import read_json, shaped_as
from dftserve.evaluate.accuracy.compare import Answered, Level, level_of, points
from dftserve.evaluate.accuracy.run import LARGEST, answers_of, by_kind

COLUMNS = ("task", "diversity", "questions", "before", "after", "difference", "p")


@dataclass(frozen=True)
class Row:
    """A task at one level of diversity."""

    task: str
    before: Level
    after: Level
    """With its difference to `before`, question by question."""


@dataclass(frozen=True)
class Drift:
    """Two models on the same questions."""

    before: str
    after: str
    """As their servers named them."""
    rows: tuple[Row, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """By row what `COLUMNS` names, in points of a hundred."""
        return [
            (
                row.task,
                f"{row.after.diversity:g}",
                str(row.after.questions),
                points(row.before.accuracy),
                points(row.after.accuracy),
                *row.after.change(),
            )
            for row in self.rows
        ]

    def render(self) -> str:
        """A table of Markdown."""
        lines = [COLUMNS, ("---",) * len(COLUMNS), *self.cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def explained(self) -> str:
        """The table, and what it is of."""
        return (
            "The same questions, with sampling, asked of the model before and after: "
            f"{self.before}, {self.after}. In points of a hundred; intervals are 95 %, differences "
            "are paired, p is McNemar's.\n\n"
            f"{self.render()}"
        )


@dataclass(frozen=True)
class Report:
    """What `evaluate accuracy` wrote of itself."""

    model: str
    grid: tuple[float, ...]
    settings: Mapping[str, Any]
    """All else on which an answer depends, beside its task."""
    files: Mapping[str, Mapping[str, str]]
    """By task the digests of the files with its questions."""


def drift(before: Path, after: Path) -> Drift:
    """Each task and level that both reports have.

    Raises:
        ValueError: no report of `evaluate accuracy`; other settings; nothing in common; or not the
            same questions.
    """
    first, second = _read(before), _read(after)
    shared = [task for task in first.files if task in second.files]
    _check_same(
        {**first.settings, **second.settings}, before, first.settings, after, second.settings
    )
    _check_same(shared, before, first.files, after, second.files)
    rows = [
        Row(name, level_of(name, level, theirs, None), level_of(name, level, ours, theirs))
        for task in shared
        for level in first.grid
        for name, theirs, ours in _pairs(task, level, before, after)
    ]
    if not rows:
        raise ValueError(f"{before}, {after}: no task at the same diversity in both.")
    return Drift(first.model, second.model, tuple(rows))


def _read(path: Path) -> Report:
    report = read_json(path, largest=LARGEST)
    with shaped_as(path, "a report of `dftserve evaluate accuracy`"):
        settings = dict(report["settings"])
        return Report(
            model=str(settings.pop("model")),
            grid=tuple(map(float, settings.pop("grid"))),
            settings=settings,
            files=dict(report["files"]),
        )


def _check_same(
    names: Iterable[str],
    before: Path,
    first: Mapping[str, Any],
    after: Path,
    second: Mapping[str, Any],
) -> None:
    for name in names:
        if first.get(name) != second.get(name):
            raise ValueError(
                f"{name}: got {first.get(name)!r} in {before} and {second.get(name)!r} in {after}; "
                "accepted: reports of the same questions, asked with the same settings."
            )


def _pairs(
    task: str, level: float, before: Path, after: Path
) -> list[tuple[str, tuple[Answered, ...], tuple[Answered, ...]]]:
    """A name and both sides' answers; none where a side has not asked them."""
    kept = [
        path.with_name(f"{path.name}.parts") / f"{task}-{level:g}.json" for path in (before, after)
    ]
    if not all(path.exists() for path in kept):
        return []
    sides = [by_kind(task, answers_of(path, path.parent)) for path in kept]
    return [(name, sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]]
