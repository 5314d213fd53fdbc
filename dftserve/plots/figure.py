"""What a plot shows, independent of how it is drawn.

    Figure("rates", "AI phrases", "At each diversity and by people.", x, y, series, references)

`svg` and `png` draw what `layout` makes of a figure, so that both show the same.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
INTERVALS = 5
"""Approximate number of intervals between the ticks of a linear axis."""
SMALLEST = 1e-280
"""Smaller numbers count as 0: the steps of an axis of them would not be normal numbers."""
FEW_DECADES = 2
"""A logarithmic axis of at most this many decades also has ticks at 2 and 5."""
SERIES = 5
"""Maximum number of series that can be distinguished, in addition to people's."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Span:
    """A number and its interval; its ends are None if they are unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for number in self.ends:
            if not math.isfinite(number):
                raise ValueError(f"span: got {number}; accepted: finite numbers.")

    @property
    def ends(self) -> tuple[float, ...]:
        """All of its numbers that are known."""
        return tuple(each for each in (self.low, self.value, self.high) if each is not None)


@dataclass(frozen=True)
class Tick:
    """A labelled value of an axis."""

    value: float
    label: str


@dataclass(frozen=True)
class Axis:
    """`title` has the unit. On a logarithmic axis, values not above `low` are at its edge."""

    title: str
    low: float
    high: float
    ticks: tuple[Tick, ...]
    is_log: bool = False
    is_flipped: bool = False
    """The low end is at the right, or at the top."""

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.is_log and self.low <= 0):
            bound = "0 < low < high" if self.is_log else "low < high"
            raise ValueError(
                f"axis {self.title!r}: got {self.low} to {self.high}; accepted: {bound}."
            )

    def at(self, value: float) -> float:
        """A value's position on the axis, from 0 at its left or lower end to 1."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return 1 - share if self.is_flipped else share


@dataclass(frozen=True)
class Point:
    """A point of a series; each coordinate has an interval."""

    x: Span
    y: Span
    description: str
    """The point and its numbers in words."""
    label: str = ""
    """Text next to the point; may be empty."""


@dataclass(frozen=True)
class Series:
    """Points of one kind; `is_human`: people's."""

    name: str
    points: tuple[Point, ...]
    is_joined: bool = False
    is_human: bool = False


@dataclass(frozen=True)
class Reference:
    """A value to compare with: a line across the plot, at `span` of an axis, with its interval as a
    band; `equal`: where both axes have the same value."""

    label: str
    axis: Literal["x", "y", "equal"]
    span: Span | None = None

    def __post_init__(self) -> None:
        if (self.axis == "equal") != (self.span is None):
            raise ValueError(
                f"reference {self.label!r}: got the axis {self.axis!r} and the span {self.span}; "
                "accepted: x or y with a span, equal without."
            )


@dataclass(frozen=True)
class Figure:
    """A plot's content, without positions or colours."""

    name: str
    """The name of its file: lower-case letters, digits and '-'."""
    title: str
    about: str
    """One or two sentences: what is shown, and how to read it."""
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"figure: got the name {self.name!r}; accepted: as 'ai-phrases'.")
        others = [each.name for each in self.series if not each.is_human]
        if len(others) > SERIES:
            raise ValueError(
                f"figure {self.name}: got {len(others)} series ({', '.join(others)}); accepted: "
                f"{SERIES} at most, besides people's."
            )

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Every value in words: the references', then the points'."""
        lines = [each.label for each in self.references]
        return (*lines, *(point.description for series in self.series for point in series.points))


def linear(
    title: str,
    values: Iterable[float],
    *,
    low: float | None = None,
    high: float | None = None,
    is_flipped: bool = False,
) -> Axis:
    """An axis that covers all values, and `low` and `high` if given, and ends at a tick on both
    sides."""
    numbers = [*values, *(end for end in (low, high) if end is not None)]
    least, most = min(numbers, default=0.0), max(numbers, default=1.0)
    if most - least < SMALLEST:
        most = least + (abs(least) if abs(least) >= SMALLEST else 1.0)
    step = _step((most - least) / INTERVALS)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += round(step * 10**digits, 6) % 1 > 0
    ticks = tuple(
        Tick(number * step, f"{number * step:.{digits}f}") for number in range(first, last + 1)
    )
    return Axis(title, ticks[0].value, ticks[-1].value, ticks, is_flipped=is_flipped)


def _step(rough: float) -> float:
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(step * decade for step in STEPS if step * decade >= rough * (1 - 1e-9))


def logarithmic(title: str, values: Iterable[float]) -> Axis:
    """An axis for non-negative numbers: those above 0 are inside, 0 is at the edge with a tick."""
    numbers = [number if number >= SMALLEST else 0.0 for number in values]
    above = [number for number in numbers if number > 0] or [1.0]
    low, high = min(above) / 3, max(above) * 1.5
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = (1.0, 2.0, 5.0) if math.log10(high / low) <= FEW_DECADES else (1.0,)
    marks = [step * 10.0**decade for decade in decades for step in within]
    ticks = [Tick(mark, f"{mark:g}") for mark in marks if low < mark <= high]
    if min(numbers, default=1.0) <= 0:
        ticks = [Tick(low, "0"), *(tick for tick in ticks if tick.value > 1.3 * low)]
    return Axis(title, low, high, tuple(ticks), is_log=True)


def categories(title: str, names: Sequence[str]) -> Axis:
    """An axis with the names at 0, 1, 2 …"""
    ticks = tuple(Tick(float(index), name) for index, name in enumerate(names))
    return Axis(title, -0.5, max(len(names), 1) - 0.5, ticks)
