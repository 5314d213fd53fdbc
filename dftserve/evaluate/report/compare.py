"""Compares two evaluations of the same prompts in pairs, level by level.

print(compare(Path("base/result.json"), Path("dft/result.json")).render())
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dftserve.bounded_files import shaped_as
from dftserve.evaluate.metrics.intervals import Estimate, difference, estimate
from dftserve.evaluate.metrics.slop import cut
from dftserve.evaluate.metrics.suite import COMPARED, EMBEDDINGS, MEASURES, PHRASES
from dftserve.evaluate.report import results

ADVICE = {
    COMPARED: "give more tokens (`--max-tokens`) to the run with more short answers",
    EMBEDDINGS: "measure both runs with the same `--embeddings`",
    PHRASES: "measure both runs with the same `--phrases`",
}
"""How to make equal what measures depend on (`Measure.depends`)."""
PARTS = {"variety": "V, style variance", "wording": "P, wording", "coherence": "q, coherence"}
P_VALUE = "mmd_style_p"
"""Left out, because a difference of p-values has no meaning."""


@dataclass(frozen=True)
class Row:
    """A number from both runs, and the difference b − a."""

    title: str
    a: Estimate
    b: Estimate
    difference: Estimate
    human: float | None
    digits: int


@dataclass(frozen=True)
class Comparison:
    """The differences b − a of two results, by diversity."""

    a: str
    b: str
    levels: tuple[tuple[Any, tuple[Row, ...]], ...]
    """(diversity, its rows), for the diversities that both runs have."""
    slop_cut: tuple[tuple[Any, float | None], ...]
    """(diversity, the share of the gap between a's rate of AI phrases and the human rate that b
    closed); None if there is no gap, or the two counted other phrases."""
    notes: tuple[str, ...] = ()
    """Why measures were left out."""

    def as_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    def render(self) -> str:
        lines = [f"a: {self.a}", f"b: {self.b}"]
        for (diversity, rows), (_, cut_) in zip(self.levels, self.slop_cut, strict=True):
            lines += ["", f"diversity {diversity}", _line("", "a", "b", "b − a", "human")]
            for row in rows:
                human = "–" if row.human is None else f"{row.human:.{row.digits}f}"
                numbers = (each.render(row.digits) for each in (row.a, row.b, row.difference))
                lines.append(_line(row.title, *numbers, human))
            if cut_ is not None:
                lines.append(f"AI phrases: {cut_ + 0:.0%} of the way from a to human.")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def compare(a: Path, b: Path) -> Comparison:
    """Compare two results, or the folders that contain them. They must have the same prompts,
    numbers of answers and anchors. Measures that depend on anything else in which they differ, such
    as the number of texts that were long enough, are left out, with a note.

    Raises:
        ValueError: a file is not a result, the runs differ in one of these, or they have no
            diversity in common.
    """
    first, second = results.read(a), results.read(b)
    with shaped_as(f"{a} and {b}", results.WRITTEN):
        return _compared(first, second, f"{a} and {b}")


def _compared(first: Mapping, second: Mapping, where: str) -> Comparison:
    for name, title in (("prompts", "prompts"), ("samples", "answers to each prompt")):
        _same(title, first["asked"][name], second["asked"][name])
    _same("anchors", first["anchors"]["digest"], second["anchors"]["digest"])
    others = {_key(level): level for level in second["levels"]}
    shared = [(level, others[_key(level)]) for level in first["levels"] if _key(level) in others]
    if not shared:
        raise ValueError(f"{where}: no diversity in common; accepted: grids that overlap.")
    for pair in shared:
        modes = [level["side"]["score"]["by_prompt"] for level in pair]
        _same("texts compared within prompts", *modes)
    differing = tuple(name for name in ADVICE if first[name] != second[name])
    names = [name for name in MEASURES if not set(differing) & set(MEASURES[name].depends)]
    gaps = [(x["diversity"], _cut(x, y, first["human"])) for x, y in shared]
    return Comparison(
        a=first["model"],
        b=second["model"],
        levels=tuple(
            (x["diversity"], _rows(x, y, first["human"], names, first["asked"])) for x, y in shared
        ),
        slop_cut=tuple((at, None if PHRASES in differing else gap) for at, gap in gaps),
        notes=tuple(_notes(differing, first, second)),
    )


def _notes(differing: Sequence[str], first: Mapping, second: Mapping) -> Iterator[str]:
    for name in differing:
        titles = [each.title for each in MEASURES.values() if name in each.depends]
        yield (
            f"Left out: {', '.join(titles)}: they depend on `{name}`, which is "
            f"{str(first[name])[:40]} in a and {str(second[name])[:40]} in b; to compare them, "
            f"{ADVICE[name]}."
        )


def _rows(
    a: Mapping, b: Mapping, human: Mapping, names: Sequence[str], asked: Mapping
) -> tuple[Row, ...]:
    """`names`: the measures that can be compared; `asked`: the settings of the requests."""
    scores = a["side"]["score"], b["side"]["score"], human["score"]
    return (
        _score_row(*scores, units=None if a["cut"] or b["cut"] else _units(scores[0], asked)),
        *(_part_row(title, *(score[name] for score in scores)) for name, title in PARTS.items()),
        *(
            _measure_row(name, a["side"]["measures"], b["side"]["measures"], human["measures"])
            for name in names
            if name in a["side"]["measures"] and name in b["side"]["measures"] and name != P_VALUE
        ),
    )


def _units(score: Mapping, asked: Mapping) -> int:
    """The number of prompts or texts that the bootstrap of a score resampled (`sds.score`)."""
    prompts = asked["answers"] // asked["samples"]
    return prompts if score["by_prompt"] and prompts > 1 else asked["answers"]


def _score_row(a: Mapping, b: Mapping, human: Mapping, *, units: int | None) -> Row:
    """`units`: the number of prompts or texts that both runs resample; None: not the same ones, as
    when answers of one are cut."""
    first, second = _estimate(a["sds"]), _estimate(b["sds"])
    value = second.value - first.value
    if units is not None and a["drawn"] and len(a["drawn"]) == len(b["drawn"]):
        change = estimate(value, np.array(b["drawn"]) - np.array(a["drawn"]), units)
    else:
        change = difference(first, second)
    return Row("Style Diversity Score", first, second, change, human["sds"]["value"], 1)


def _part_row(title: str, a: Mapping, b: Mapping, human: Mapping) -> Row:
    first, second = _estimate(a), _estimate(b)
    return Row(title, first, second, difference(first, second), human["value"], 2)


def _measure_row(name: str, a: Mapping, b: Mapping, human: Mapping) -> Row:
    first, second = _estimate(a[name]), _estimate(b[name])
    of_human = human[name]["value"] if name in human else None
    change = difference(first, second)
    return Row(MEASURES[name].title, first, second, change, of_human, MEASURES[name].digits)


def _cut(a: Mapping, b: Mapping, human: Mapping) -> float | None:
    base, tuned, people = (
        side["measures"]["slop"]["value"] for side in (a["side"], b["side"], human)
    )
    return cut(base, tuned, people) if base != people else None


def _estimate(stored: Mapping) -> Estimate:
    left_out = tuple(stored["left_out"])
    return Estimate(stored["value"], stored["low"], stored["high"], left_out, stored["parts"])


def _same(what: str, a: object, b: object) -> None:
    if a != b:
        raise ValueError(
            f"{what}: got {str(a)[:16]!r} and {str(b)[:16]!r}; accepted: the same in both runs, so "
            "that they can be paired."
        )


def _key(level: Mapping) -> str:
    return json.dumps(level["diversity"], sort_keys=True)


def _line(*cells: str) -> str:
    title, *numbers = cells
    return f"{title:24}" + "".join(f"  {number:>26}" for number in numbers)
