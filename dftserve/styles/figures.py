"""The plots of a style profile: each phrase's rate against people's, and the rounds of a fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dftserve.plots.figure import (
    Figure,
    Point,
    Reference,
    Series,
    Span,
    categories,
    linear,
    logarithmic,
)
from dftserve.styles.rounds import Round

NAMED = 8
"""Number of points labelled with their phrase; every point has it in its title."""
UNFITTED = {
    "sds": ("Style Diversity Score", "Style Diversity Score, people near 100"),
    "mmd_style": ("Style distance to human text", "√MMD² of style features"),
}
"""Measures that the fit does not use: title and axis label."""


@dataclass(frozen=True)
class Rates:
    """A phrase's rates per 1,000 words."""

    phrase: str
    model: Span
    human: Span


def phrase_rates(series: Mapping[str, Sequence[Rates]]) -> Figure:
    """A plot of each phrase's rate in the model's texts and in people's.

    Args:
        series: rates by the texts that they were counted in.
    """
    spans = [
        span for rates in series.values() for each in rates for span in (each.model, each.human)
    ]
    # Without low ends, which may be a fortieth of the value; they are clipped at the axis's edge.
    reached = [end for span in spans for end in (span.value, span.ends[-1])]
    *_, last = series
    return Figure(
        name="phrase-rates",
        title="Phrases: how often the model and people write them",
        about="One point per phrase, in occurrences per 1,000 words. On the line the model writes "
        "it as often as people, above it more often. A rate of 0 is drawn at the edge.",
        x=logarithmic("people, per 1,000 words", reached),
        y=logarithmic("the model, per 1,000 words", reached),
        series=tuple(
            Series(name, _points(name, rates, NAMED if name == last else 0))
            for name, rates in series.items()
        ),
        references=(Reference("as often as people", "equal"),),
    )


def _points(name: str, rates: Sequence[Rates], named: int) -> tuple[Point, ...]:
    often = sorted(rates, key=lambda each: -each.model.value)[:named]
    return tuple(
        Point(
            each.human,
            each.model,
            f"“{each.phrase}”, {name}: {_render(each.model)}, people {_render(each.human)}",
            each.phrase if each in often else "",
        )
        for each in rates
    )


def by_round(rounds: Sequence[Round]) -> tuple[Figure, ...]:
    """The rate by round, and the measures that are not fitted."""
    unfitted = [name for name in UNFITTED if any(name in one.unfitted for one in rounds)]
    return (_rates(rounds), *(_unfitted(rounds, name) for name in unfitted))


def _rates(rounds: Sequence[Round]) -> Figure:
    fitted = [(index, _span(one.rate, one.interval)) for index, one in enumerate(rounds)]
    held_out = [
        (index, _span(one.held_out_rate, one.held_out_interval))
        for index, one in enumerate(rounds)
        if one.held_out_rate is not None
    ]
    human = rounds[-1].human_rate
    series = [_joined("prompts that are fitted", fitted, rounds)]
    if held_out:
        series.append(_joined("prompts held out", held_out, rounds))
    values = [end for _, span in (*fitted, *held_out) for end in span.ends]
    return Figure(
        name="rounds",
        title="All phrases of the profile, by round",
        about="Occurrences per 1,000 words with the round's profile in force; the round's step is "
        "taken afterwards.",
        x=categories("round", [f"{one.number}" for one in rounds]),
        y=linear("phrases per 1,000 words", [human, *values], low=0),
        series=tuple(series),
        references=(Reference(f"people {human:.2f}", "y", Span(human)),),
    )


def _unfitted(rounds: Sequence[Round], name: str) -> Figure:
    title, axis = UNFITTED[name]
    values = [
        (index, Span(one.unfitted[name]))
        for index, one in enumerate(rounds)
        if math.isfinite(one.unfitted.get(name, math.nan))
    ]
    return Figure(
        name=f"rounds-{name.replace('_', '-')}",
        title=f"{title}, by round",
        about="Measured for information; the fit does not use it.",
        x=categories("round", [f"{one.number}" for one in rounds]),
        y=linear(axis, [span.value for _, span in values], low=0),
        series=(_joined(title, values, rounds),),
    )


def _joined(name: str, spans: Sequence[tuple[int, Span]], rounds: Sequence[Round]) -> Series:
    points = tuple(
        Point(
            Span(float(index)),
            span,
            f"round {rounds[index].number}, {name}: {_render(span)}",
            f"{span.value:.3g}",
        )
        for index, span in spans
    )
    return Series(name, points, is_joined=True)


def _span(value: float, interval: Sequence[float]) -> Span:
    return Span(value, *interval)


def _render(span: Span) -> str:
    if span.low is None or span.high is None:
        return f"{span.value:.3f}"
    return f"{span.value:.3f} [{span.low:.3f}, {span.high:.3f}]"
