"""What diversity does to accuracy: each level's share, and its difference to level 0 on the same
questions.

Pairing removes what the questions differ among themselves: unpaired, one run of MMLU is known to
± .4 points, of GSM8K to 1.3, of HumanEval to 3.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dftserve.evaluate.accuracy.grade import CUT, UNREADABLE
from dftserve.evaluate.metrics import intervals
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.text.thinking import CUT_NOTE

COLUMNS = ("diversity", "questions", "accuracy", "unreadable", "cut", "difference to 0", "p")


@dataclass(frozen=True)
class Answered:
    """One question, and of each answer to it: whether it was right, its text (None: the server gave
    none), and what was judged of that: the letter or number found in it, how the program ended,
    `grade.UNREADABLE` or `grade.CUT`."""

    question: str
    right: tuple[bool, ...]
    said: tuple[str | None, ...] = ()
    judged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Level:
    """One level of a grid. Shares in [0, 1]."""

    diversity: float
    questions: int
    accuracy: Estimate
    """Of all answers: those that could not be read, or were cut, are not right. With a Wilson
    interval (1927) for one answer a question, else by bootstrap of questions."""
    unreadable: float
    """Share of the answers in which no letter, number or function was found."""
    cut: float
    """Share of the answers that ended in their thinking, where the tokens were used up."""
    difference: Estimate | None
    """To the level or the model that it is compared with, by bootstrap of questions."""
    p: float | None
    """McNemar's exact p of no difference; None where a question has several answers, which are not
    independent."""

    def change(self) -> tuple[str, str]:
        """The difference, in points of a hundred, and p; empty where there is none."""
        difference = "" if self.difference is None else points(self.difference)
        return difference, "" if self.p is None else f"{self.p:.3g}"


@dataclass(frozen=True)
class Comparison:
    """A task over a grid of diversity."""

    task: str
    levels: tuple[Level, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        """A table, in points of a hundred."""
        rows: list[tuple[str, ...]] = [COLUMNS]
        for level in self.levels:
            accuracy = points(level.accuracy)
            unread = [f"{100 * share:.1f}" for share in (level.unreadable, level.cut)]
            counts = (level_text(level.diversity), str(level.questions))
            rows.append((*counts, accuracy, *unread, *level.change()))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if any(level.cut for level in self.levels):
            lines.append(CUT_NOTE)
        return "\n".join([self.task, *(f"  {line}" for line in lines)])


def compare(task: str, answers: Mapping[float, Sequence[Answered]]) -> Comparison:
    """Each level of a grid, in rising order, against level 0.

    Raises:
        ValueError: no level 0, no questions, or not the same questions, answered as often, in the
            same order at every level.
    """
    if 0 not in answers:
        raise ValueError(f"grid: got {sorted(answers)}; accepted: levels with 0 among them.")
    base = answers[0]
    if not base:
        raise ValueError(f"{task}: got no questions; accepted: at least one.")
    levels = {each: None if each == 0 else base for each in sorted(answers)}
    compared = (level_of(task, each, answers[each], levels[each]) for each in levels)
    return Comparison(task, tuple(compared))


def _shape(answered: Sequence[Answered]) -> list[tuple[str, int]]:
    return [(each.question, len(each.right)) for each in answered]


def level_of(
    task: str, diversity: float, answered: Sequence[Answered], base: Sequence[Answered] | None
) -> Level:
    """A level's shares, and its difference to the answers `base` to the same questions.

    Raises:
        ValueError: `base` are not the same questions, answered as often, in the same order.
    """
    if base is not None and _shape(answered) != _shape(base):
        raise ValueError(
            f"{task}: diversity {level_text(diversity)} did not answer the questions that it is "
            "compared with, in the same order and as often; compare runs over the same ones."
        )
    share_Q = np.array([np.mean(each.right) for each in answered])
    once = all(len(each.right) == 1 for each in answered)
    if once:
        accuracy = intervals.wilson(int(share_Q.sum()), len(share_Q))
    else:
        accuracy = intervals.mean(share_Q)
    judged = [each for question in answered for each in question.judged]
    unreadable, cut = (judged.count(state) / max(1, len(judged)) for state in (UNREADABLE, CUT))
    difference = p = None
    if base is not None:
        base_Q = np.array([np.mean(each.right) for each in base])
        difference = intervals.paired_difference(base_Q, share_Q)
        p = intervals.mcnemar(base_Q, share_Q) if once else None
    return Level(diversity, len(answered), accuracy, unreadable, cut, difference, p)


def points(estimate: Estimate) -> str:
    """In points of a hundred."""
    low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    return Estimate(100 * estimate.value, low, high).render(1)


def level_text(level: float) -> str:
    """A level of diversity in a table or a file's name: short, and no other level's."""
    level = float(level) + 0.0  # No -0.
    short = f"{level:g}"
    return short if float(short) == level else repr(level)
