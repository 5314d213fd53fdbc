"""The plots of an evaluation: distance to human text, coherence and variety at each diversity, and
rates of phrases compared with the human rates."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.suite import MEASURES
from dftserve.evaluate.report.results import Result, Side
from dftserve.plots.figure import (
    Figure,
    Point,
    Reference,
    Series,
    Span,
    categories,
    linear,
)

HUMAN = "human"
"""Name of human text among the sides of a report."""
SCORE = "Style Diversity Score, 0 to 100"
RATES = {"slop": "ai-phrases", "contrast": "not-x-but-y"}
"""The measures that are rates per 1,000 words, and their figures' names."""


@dataclass(frozen=True)
class Accuracy:
    """Results of `dftserve evaluate accuracy` by task and diversity, as shares in [0, 1]."""

    model: str
    temperature: float
    tasks: Mapping[str, Mapping[float, Estimate]]

    def check(self, grid: Iterable[Any], temperature: float) -> None:
        """Check that the accuracies can be plotted against answers at these levels.

        Raises:
            ValueError: measured at another temperature, or a task at none of the grid's levels.
        """
        if self.temperature != temperature:
            raise ValueError(
                f"--accuracy: got a report at temperature {self.temperature:g}, and this run is at "
                f"{temperature:g}; accepted: one of the same temperature."
            )
        numbers = {_number(level) for level in grid}
        for task, levels in self.tasks.items():
            if numbers.isdisjoint(levels):
                shown = ", ".join(f"{level:g}" for level in sorted(levels)) or "none"
                raise ValueError(
                    f"--accuracy: got {task} at the diversities {shown}, none of them in --grid; "
                    "accepted: a report that has at least one of them for each task."
                )


def figures(result: Result, accuracy: Accuracy | None = None) -> tuple[Figure, ...]:
    """The figures of quality against diversity, then those of rates."""
    quality = [_distance(result), _coherence(result)]
    if accuracy is not None:
        quality.append(_accuracy(result, accuracy))
    return (*quality, *rates(result))


def rates(result: Result) -> tuple[Figure, ...]:
    """A plot of each rate per 1,000 words that was measured."""
    return tuple(_rate(result, name) for name in RATES if name in result.human.measures)


def render(diversity: Any) -> str:
    """A diversity as text: a number, or the object as JSON."""
    return f"{diversity:g}" if isinstance(diversity, int | float) else json.dumps(diversity)


def sides(result: Result) -> list[tuple[str, Side]]:
    """(name, side) for human text, then for each diversity."""
    levels = [(f"diversity {render(level.diversity)}", level.side) for level in result.levels]
    return [(HUMAN, result.human), *levels]


def _distance(result: Result) -> Figure:
    measured = [(name, side.score.sds, side.measures["mmd_style"]) for name, side in sides(result)]
    up = [end for _, _, distance in measured for end in _ends(distance)]
    return Figure(
        name="distance",
        title="Diversity against distance to human text",
        about="One point per diversity: right is more varied, up is closer to human text.",
        x=linear(SCORE, [end for _, score, _ in measured for end in _ends(score)], low=0, high=100),
        y=linear(
            "style distance to human text (√MMD²); 0 is at the top",
            up,
            low=0,
            high=0.05,
            is_flipped=True,
        ),
        series=_people_and_levels(measured, (1, 3)),
    )


def _coherence(result: Result) -> Figure:
    measured = [(name, side.score.variety, side.score.coherence) for name, side in sides(result)]
    human = result.human.score
    return Figure(
        name="quality",
        title="Coherence against style variance",
        about="One point per diversity: right is more varied, up is more coherent; both are 1 for "
        "human text.",
        x=linear("V, style variance, human = 1", _all_ends(x for _, x, _ in measured), low=0),
        y=linear("q, coherence, human = 1", _all_ends(y for _, _, y in measured), low=0, high=1),
        series=_people_and_levels(measured, (2, 2)),
        references=(
            *_references("people", "x", human.variety, 2),
            *_references("people", "y", human.coherence, 2),
        ),
    )


def _accuracy(result: Result, accuracy: Accuracy) -> Figure:
    """Accuracy against the score at the same diversity."""
    scores = {_number(level.diversity): level.side.score.sds for level in result.levels}
    series = []
    for task, levels in accuracy.tasks.items():
        measured = [
            (f"{task}, diversity {level:g}", scores[level], _percent(levels[level]))
            for level in sorted(levels)
            if level in scores
        ]
        series.append(Series(task, _points(measured, (1, 1)), is_joined=True))
    points = [point for each in series for point in each.points]
    return Figure(
        name="accuracy",
        title="Accuracy against diversity",
        about=f"One point per diversity, the right answers of {accuracy.model} at temperature "
        f"{accuracy.temperature:g} against the score of the texts: right is more varied, up is "
        "more often correct.",
        x=linear(SCORE, [end for point in points for end in point.x.ends], low=0, high=100),
        y=linear("right answers, %", [end for point in points for end in point.y.ends]),
        series=tuple(series),
        references=_references("people's score", "x", result.human.score.sds, 1),
    )


def _rate(result: Result, name: str) -> Figure:
    measure, human = MEASURES[name], result.human.measures[name]
    levels = [
        (index, level.diversity, level.side.measures[name])
        for index, level in enumerate(result.levels)
        if _is_known(level.side.measures[name])
    ]
    points = tuple(
        Point(
            Span(float(index)),
            _span(rate),
            f"diversity {render(diversity)}: {rate.render(measure.digits)}",
            f"{rate.value:.{measure.digits}f}",
        )
        for index, diversity, rate in levels
    )
    values = _all_ends([human, *(rate for *_, rate in levels)])
    return Figure(
        name=RATES[name],
        title=f"{measure.title} per 1,000 words",
        about="At each diversity; the target is the human rate, not 0.",
        x=categories("diversity", [render(level.diversity) for level in result.levels]),
        y=linear("per 1,000 words", values, low=0),
        series=(Series(measure.title, points),),
        references=_references("people", "y", human, measure.digits),
    )


Measured = tuple[str, Estimate, Estimate]
"""(name, x, y)."""


def _people_and_levels(measured: list[Measured], digits: tuple[int, int]) -> tuple[Series, Series]:
    people, *levels = measured
    return (
        Series("people", _points([people], digits), is_human=True),
        Series("the model at each diversity", _points(levels, digits), is_joined=True),
    )


def _points(measured: Iterable[Measured], digits: tuple[int, int]) -> tuple[Point, ...]:
    """Values that are NaN have no point; the tables of the report show them."""
    return tuple(
        Point(
            _span(x),
            _span(y),
            f"{name}: {x.render(digits[0])}, {y.render(digits[1])}",
            "people" if name == HUMAN else name.rpartition("diversity ")[2],
        )
        for name, x, y in measured
        if _is_known(x) and _is_known(y)
    )


def _references(name: str, axis: Any, value: Estimate, digits: int) -> tuple[Reference, ...]:
    if not _is_known(value):
        return ()
    return (Reference(f"{name} {value.render(digits)}", axis, _span(value)),)


def _is_known(estimate: Estimate) -> bool:
    return math.isfinite(estimate.value)


def _span(estimate: Estimate) -> Span:
    ends = (estimate.low, estimate.high)
    if any(end is None or not math.isfinite(end) for end in ends):
        return Span(estimate.value)
    return Span(estimate.value, *ends)


def _ends(estimate: Estimate) -> tuple[float, ...]:
    return _span(estimate).ends if _is_known(estimate) else ()


def _all_ends(estimates: Iterable[Estimate]) -> list[float]:
    return [end for estimate in estimates for end in _ends(estimate)]


def _percent(estimate: Estimate) -> Estimate:
    low, high = (None if end is None else 100 * end for end in (estimate.low, estimate.high))
    return Estimate(100 * estimate.value, low, high)


def _number(diversity: Any) -> float | None:
    is_number = isinstance(diversity, int | float) and not isinstance(diversity, bool)
    return float(diversity) if is_number else None
