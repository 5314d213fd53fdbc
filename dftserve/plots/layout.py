"""Lay out a figure: shapes on a canvas of `WIDTH` by `HEIGHT` pixels, x to the right, y down, in
the order in which they are drawn."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dftserve.plots.figure import Axis, Figure, Point, Reference, Series, Span

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 620, 78, 364
"""The frame."""
INSET = 14
"""Pixels from the frame to the ends of the axes: room for the points there."""
FONT = 12
"""Pixels: the height of a letter's box."""
GLYPH = 6.8
"""Pixels: about the width of a character; a narrower label only has more space around it."""
MARK = 8
"""Pixels: the width of a point's mark."""
FAINT = 0.15
"""The opacity of the intervals of more than `MANY` points."""
MANY = 30
"""Number of points above which their intervals are faint."""
TURNS = 24
"""Corners of a circle: enough to look round at the size of a mark."""

Anchor = Literal["start", "middle", "end"]
Form = Literal["circle", "square", "triangle", "wedge", "bar", "diamond"]
Tone = Literal["text", "muted", "human", "series-1", "series-2", "series-3", "series-4", "series-5"]

FORMS: tuple[Form, ...] = ("circle", "square", "triangle", "wedge", "bar")
TONES: tuple[Tone, ...] = ("series-1", "series-2", "series-3", "series-4", "series-5")
COLOURS: dict[Tone, str] = {
    "text": "#222222",
    "muted": "#666666",
    "human": "#1f7a3d",
    "series-1": "#3a6ea5",
    "series-2": "#b5485a",
    "series-3": "#8a6200",
    "series-4": "#7b3fa0",
    "series-5": "#00757a",
}
"""On white; a page has others in the system's dark mode."""


@dataclass(frozen=True)
class Line:
    """A straight line between two positions, in pixels."""

    x0: float
    y0: float
    x1: float
    y1: float
    tone: Tone
    width: float = 1.0
    opacity: float = 1.0
    is_dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A filled rectangle."""

    x0: float
    y0: float
    x1: float
    y1: float
    tone: Tone
    opacity: float


@dataclass(frozen=True)
class Mark:
    """The symbol of a point at a position, in pixels."""

    x: float
    y: float
    form: Form
    tone: Tone
    description: str = ""


@dataclass(frozen=True)
class Text:
    """`y` is the baseline."""

    x: float
    y: float
    text: str
    tone: Tone = "text"
    anchor: Anchor = "start"
    is_bold: bool = False


Shape = Line | Band | Mark | Text


@dataclass(frozen=True)
class _Box:
    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def of(cls, text: Text) -> "_Box":
        width = GLYPH * len(text.text)
        x0 = text.x - {"start": 0.0, "middle": width / 2, "end": width}[text.anchor]
        return cls(x0, text.y - FONT + 2, x0 + width, text.y + 3)

    @classmethod
    def around(cls, shape: Line | Mark) -> "_Box":
        if isinstance(shape, Line):
            across, down = sorted((shape.x0, shape.x1)), sorted((shape.y0, shape.y1))
            if across[1] - across[0] > 2 and down[1] - down[0] > 2:
                return cls(0, 0, 0, 0)  # A sloping line covers little of its box.
            return cls(across[0] - 1, down[0] - 1, across[1] + 1, down[1] + 1)
        reach = MARK / 2 + 1
        return cls(shape.x - reach, shape.y - reach, shape.x + reach, shape.y + reach)

    def overlap(self, other: "_Box") -> float:
        """The area that both cover."""
        wide = min(self.x1, other.x1) - max(self.x0, other.x0)
        tall = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(wide, 0.0) * max(tall, 0.0)


def shapes(figure: Figure) -> list[Shape]:
    """Everything that is drawn, in the order of drawing."""
    styled = list(_styled(figure.series))
    lines = [shape for series, tone, _ in styled for shape in _lines(figure, series, tone)]
    marks = [shape for each in styled for shape in _marks(figure, *each)]
    references = [shape for each in figure.references for shape in _reference(figure, each)]
    occupied = [_Box.around(each) for each in (*lines, *marks) if _obscures_labels(each)]
    return [
        *_frame(figure),
        *_legend(styled),
        *references,
        *lines,
        *marks,
        *_labels(figure, styled, occupied),
    ]


def _obscures_labels(shape: Line | Mark) -> bool:
    """Whether a label over it would be hard to read."""
    return isinstance(shape, Mark) or shape.opacity > FAINT


def outline(mark: Mark) -> list[tuple[float, float]]:
    """The corners of a mark."""
    r = MARK / 2
    return [(mark.x + r * across, mark.y + r * down) for across, down in _CORNERS[mark.form]]


_CORNERS: dict[Form, list[tuple[float, float]]] = {
    "circle": [
        (math.cos(math.tau * turn / TURNS), math.sin(math.tau * turn / TURNS))
        for turn in range(TURNS)
    ],
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
    "wedge": [(0, 1.1), (1.1, -0.9), (-1.1, -0.9)],
    "bar": [(-1.4, -0.5), (1.4, -0.5), (1.4, 0.5), (-1.4, 0.5)],
    "diamond": [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
}


def plain(text: str) -> str:
    """The text without unprintable characters, which fonts lack and XML does not allow."""
    return "".join(mark if mark.isprintable() else " " for mark in text)


def short(text: str, width: float) -> str:
    """The text, cut to about this many pixels."""
    most = max(int(width / GLYPH), 2)
    text = plain(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _styled(series: Iterable[Series]) -> Iterator[tuple[Series, Tone, Form]]:
    looks = iter(zip(TONES, FORMS, strict=True))
    for each in series:
        yield (each, "human", "diamond") if each.is_human else (each, *next(looks))


def _x(axis: Axis, value: float) -> float:
    return LEFT + INSET + axis.at(value) * (RIGHT - LEFT - 2 * INSET)


def _y(axis: Axis, value: float) -> float:
    return BOTTOM - INSET - axis.at(value) * (BOTTOM - TOP - 2 * INSET)


# ── Around the points ────────────────────────────────────────────────────────────────────────────


def _frame(figure: Figure) -> Iterator[Shape]:
    yield Text(8, 20, short(figure.title, WIDTH - 16), is_bold=True)
    yield Text(8, TOP - 14, f"↑ {plain(figure.y.title)}", "muted")
    yield Text(RIGHT, HEIGHT - 12, f"{plain(figure.x.title)} →", "muted", "end")
    room = (RIGHT - LEFT) / max(len(figure.x.ticks), 1) - 4
    for tick in figure.x.ticks:
        x = _x(figure.x, tick.value)
        yield Line(x, BOTTOM, x, BOTTOM + 4, "muted")
        yield Text(x, BOTTOM + 18, short(tick.label, max(room, 4 * GLYPH)), "muted", "middle")
    for tick in figure.y.ticks:
        y = _y(figure.y, tick.value)
        yield Line(LEFT, y, RIGHT, y, "muted", opacity=0.2)
        yield Text(LEFT - 8, y + 4, short(tick.label, LEFT - 10), "muted", "end")
    yield Line(LEFT, TOP, LEFT, BOTTOM, "muted")
    yield Line(LEFT, BOTTOM, RIGHT, BOTTOM, "muted")


def _legend(styled: Sequence[tuple[Series, Tone, Form]]) -> Iterator[Shape]:
    if len(styled) < 2:
        return
    room = WIDTH - 16 - len(styled) * (MARK + 24)
    is_wide = GLYPH * sum(len(series.name) for series, *_ in styled) > room
    x = 8.0
    for series, tone, form in styled:
        name = short(series.name, room / len(styled) if is_wide else room)
        yield Mark(x + MARK / 2, 38, form, tone)
        yield Text(x + MARK + 6, 42, name)
        x += MARK + 24 + GLYPH * len(name)


def _reference(figure: Figure, reference: Reference) -> Iterator[Shape]:
    span = reference.span
    if span is None:
        low = max(figure.x.low, figure.y.low)
        high = min(figure.x.high, figure.y.high)
        ends = [(_x(figure.x, each), _y(figure.y, each)) for each in (low, high)]
        yield Line(*ends[0], *ends[1], "human", 1.5, is_dashed=True)
        return
    interval = _interval(span) or ()
    if reference.axis == "x":
        x, ends = _x(figure.x, span.value), [_x(figure.x, end) for end in interval]
        if ends:
            yield Band(min(ends), TOP, max(ends), BOTTOM, "human", 0.12)
        yield Line(x, TOP, x, BOTTOM, "human", 1.5, is_dashed=True)
    else:
        y, ends = _y(figure.y, span.value), [_y(figure.y, end) for end in interval]
        if ends:
            yield Band(LEFT, min(ends), RIGHT, max(ends), "human", 0.12)
        yield Line(LEFT, y, RIGHT, y, "human", 1.5, is_dashed=True)


# ── The points ───────────────────────────────────────────────────────────────────────────────────


def _position(figure: Figure, point: Point) -> tuple[float, float]:
    return _x(figure.x, point.x.value), _y(figure.y, point.y.value)


def _lines(figure: Figure, series: Series, tone: Tone) -> Iterator[Line]:
    """The lines between points, and each point's intervals, which are faint if there are many."""
    positions = [_position(figure, point) for point in series.points]
    if series.is_joined:
        for (x0, y0), (x1, y1) in pairwise(positions):
            yield Line(x0, y0, x1, y1, tone, 1.5, 0.6)
    opacity = 0.7 if len(positions) <= MANY else FAINT
    for point, (x, y) in zip(series.points, positions, strict=True):
        if ends := _interval(point.x):
            yield Line(_x(figure.x, ends[0]), y, _x(figure.x, ends[1]), y, tone, 1.5, opacity)
        if ends := _interval(point.y):
            yield Line(x, _y(figure.y, ends[0]), x, _y(figure.y, ends[1]), tone, 1.5, opacity)


def _interval(span: Span) -> tuple[float, float] | None:
    return None if span.low is None or span.high is None else (span.low, span.high)


def _marks(figure: Figure, series: Series, tone: Tone, form: Form) -> Iterator[Mark]:
    for point in series.points:
        yield Mark(*_position(figure, point), form, tone, plain(point.description))


def _labels(
    figure: Figure, styled: Sequence[tuple[Series, Tone, Form]], occupied: list[_Box]
) -> Iterator[Shape]:
    """The labels, each placed where it hides least: a reference's along its line, a point's next to
    it."""
    choices = [_along(figure, each) for each in figure.references]
    choices += [
        _beside(figure, point, tone)
        for series, tone, _ in styled
        for point in series.points
        if point.label
    ]
    for texts in choices:
        best = min(texts, key=lambda text: _hidden(_Box.of(text), occupied))
        occupied = [*occupied, *[_Box.of(best)] * LABEL_WEIGHT]
        yield best


LABEL_WEIGHT = 5
"""A label over another hides both: it counts as that many lines or marks."""


def _along(figure: Figure, reference: Reference) -> list[Text]:
    label, span = short(reference.label, (RIGHT - LEFT) / 2), reference.span
    if span is None:
        label = f"– – {label}"
        return [
            Text(RIGHT - 6, BOTTOM - 8, label, "human", "end"),
            Text(LEFT + 6, TOP + FONT + 2, label, "human"),
        ]
    if reference.axis == "x":
        x = _x(figure.x, span.value)
        heights = (BOTTOM - 8, TOP + FONT + 2, (TOP + BOTTOM) / 2)
        return [
            Text(x + across, y, label, "human", anchor)
            for y in heights
            for across, anchor in _SIDES
        ]
    y = _y(figure.y, span.value)
    return [
        Text(x, y + down, label, "human", anchor) for down in (-5, FONT + 2) for x, anchor in _ENDS
    ]


_SIDES: tuple[tuple[float, Anchor], ...] = ((-6, "end"), (6, "start"))
_ENDS: tuple[tuple[float, Anchor], ...] = (
    (RIGHT - 6, "end"),
    (LEFT + 6, "start"),
    ((LEFT + RIGHT) / 2, "middle"),
)


def _beside(figure: Figure, point: Point, tone: Tone) -> list[Text]:
    x, y = _position(figure, point)
    label = short(point.label, (RIGHT - LEFT) / 2)
    return [Text(x + across, y + down, label, tone, anchor) for across, down, anchor in _BESIDE]


_BESIDE: tuple[tuple[float, float, Anchor], ...] = (
    (8, -6, "start"),
    (8, 14, "start"),
    (-8, -6, "end"),
    (-8, 14, "end"),
    (0, -10, "middle"),
    (0, 20, "middle"),
    (12, 4, "start"),
    (-12, 4, "end"),
    (14, -20, "start"),
    (14, 28, "start"),
    (-14, -20, "end"),
    (-14, 28, "end"),
)


def _hidden(box: _Box, occupied: Iterable[_Box]) -> float:
    """The area of other boxes that a label covers; area outside the axes counts four times."""
    whole = (box.x1 - box.x0) * (box.y1 - box.y0)
    inside = box.overlap(_Box(LEFT, TOP - 12, RIGHT, BOTTOM))
    return sum(map(box.overlap, occupied)) + 4 * (whole - inside)
