"""How diversity changes accuracy: the share of right answers at each level, and its difference from
level 0 on the same questions.

Pairing removes the variance between questions: unpaired, one run of MMLU is accurate to ± .4
points, of GSM8K to ± 1.3, of HumanEval to ± 3.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dftserve.evaluate.accuracy.grade import CUT, UNREADABLE
from dftserve.evaluate.metrics import intervals
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.text.thinking import CUT_NOTE

COLUMNS = ("diversity", "questions", "accuracy", "unreadable", "cut", "difference to 0", "p")


@dataclass(frozen=True)
class Answered:
    """One question, and for each answer to it: whether it was right, its text (None: the server
    gave none), and its grade: the letter or number found in it, how its program ended, or one of
    `grade`'s constants."""

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
    """Of all answers; unreadable and cut ones count as wrong. The interval is Wilson's (1927) if
    there is one answer per question, otherwise `intervals.mean_share` over questions."""
    unreadable: float
    """Share of the answers in which no letter, number or function was found."""
    cut: float
    """Share of the answers that ran out of tokens while still thinking."""
    difference: Estimate | None
    """From the level or the model that it is compared with (`_difference`)."""
    p: float | None
    """McNemar's exact p for no difference; None if questions have several answers, which are not
    independent."""

    def change(self) -> tuple[str, str]:
        """The difference, in percentage points, and p; each empty where there is none."""
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
        """A table, in percent."""
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
    """Compare each level of a grid, in ascending order, with level 0.

    Raises:
        ValueError: no level 0, no questions, or levels that differ in the questions, their order
            or the number of answers.
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
    """A level's results, and its difference from `base`, answers to the same questions.

    Raises:
        ValueError: `base` differs in the questions, their order or the number of answers.
    """
    if base is not None and _shape(answered) != _shape(base):
        raise ValueError(
            f"{task}: the answers at diversity {level_text(diversity)} and those they are compared "
            "with differ in the questions, their order or the number of answers; compare runs over "
            "the same questions."
        )
    share_Q = np.array([np.mean(each.right) for each in answered])
    once = all(len(each.right) == 1 for each in answered)
    if once:
        accuracy = intervals.wilson(int(share_Q.sum()), len(share_Q))
    else:
        accuracy = intervals.mean_share(share_Q)
    judged = [each for question in answered for each in question.judged]
    unreadable, cut = (judged.count(state) / max(1, len(judged)) for state in (UNREADABLE, CUT))
    difference = p = None
    if base is not None:
        base_Q = np.array([np.mean(each.right) for each in base])
        difference = _difference(base_Q, share_Q)
        p = intervals.mcnemar(base_Q, share_Q) if once else None
    return Level(diversity, len(answered), accuracy, unreadable, cut, difference, p)


def _difference(base_Q: NDArray, share_Q: NDArray) -> Estimate:
    """The difference by bootstrap over questions. If no question differs, no resample does: the
    interval is then as wide as the share of questions that can differ, by Wilson's interval."""
    if np.array_equal(base_Q, share_Q):
        reach = intervals.wilson(0, len(base_Q)).high or 0.0
        return Estimate(0.0, -reach, reach)
    return intervals.paired_difference(base_Q, share_Q)


def points(estimate: Estimate) -> str:
    """Formatted in percentage points."""
    low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    return Estimate(100 * estimate.value, low, high).render(1)


def level_text(level: float) -> str:
    """A level of diversity for a table or a file name: short, and distinct for each level."""
    level = float(level) + 0.0  # No -0.
    short = f"{level:g}"
    return short if float(short) == level else repr(level)
