"""An evaluation as one HTML file: diversity against distance to human text, every measure beside
its human value, the most repeated phrases, texts side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dftserve import atomic
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.sds import Score
from dftserve.evaluate.metrics.suite import MEASURES
from dftserve.evaluate.report.results import BIN_NATS, Entropy, Level, Result
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.page import bars, joined, note, page, section, table

REPORT = "report.html"
WIDTH, HEIGHT, EDGE, TOP = 560, 340, 48, 32
PHRASES = 12
SCORE_PARTS = (
    ("Style Diversity Score", "sds", 1, "100 · min(1, q) · min(1, V) · clip(P, 0, 1)"),
    ("V, style variance", "variety", 2, "√ of reliable variance between texts, human = 1"),
    ("P, wording", "wording", 2, "how little phrasing is shared, human = 1"),
    ("q, coherence", "coherence", 2, "share of texts whose word order carries meaning, human = 1"),
)


def write(result: Result, folder: Path) -> None:
    atomic.write_text(folder / REPORT, as_html(result))


def as_html(result: Result) -> str:
    return page(
        f"{result.model}: style diversity",
        note(_about(result)),
        section("Diversity against distance to human text", _plot(result)),
        section("The score and its parts", table(_head(result), _score_rows(result), (0, 1))),
        section("Every measure", table(_head(result), _measure_rows(result), (0, 1))),
        section("At each diversity", table(_RUN_HEAD, map(_run_row, result.levels)), note(_ENDS)),
        *(_entropies(level) for level in result.levels if level.entropy is not None),
        section("Phrases that the most texts have", _phrases(result)),
        section("The same prompts", note(_cut(result)), *_samples(result)),
    )


def as_text(result: Result) -> str:
    """For a terminal: the score, its parts and the distances."""
    lines = [f"{_about(result)}", "", _columns("", [n for n, _ in _sides(result)])]
    for title, *cells in ([row[0], *row[2:]] for row in _score_rows(result)):
        lines.append(_columns(title, cells))
    for title, *cells in ([row[0], *row[2:]] for row in _measure_rows(result)):
        lines.append(_columns(title, cells))
    for title in ("cut", "unfinished"):
        counts = [getattr(level, title) for level in result.levels]
        if any(counts):
            lines.append(_columns(title, ["–", *map(str, counts)]))
    if any(level.cut for level in result.levels):
        lines.append(CUT_NOTE)
    return "\n".join(lines)


def _columns(title: str, cells: Sequence[str]) -> str:
    return f"{title:24}" + "".join(f"{cell:>24}" for cell in cells)


def _about(result: Result) -> str:
    modes = [level.side.score.by_prompt for level in result.levels]
    pairs = "within prompts" if all(modes) else "between all texts"
    if any(modes) and not all(modes):
        pairs = "within prompts at some diversities only, as too many answers were cut at others"
    cost = result.cost
    return (
        f"{result.asked['answers']} answers at each diversity, their first "
        f"{result.anchors['words']} words, compared {pairs}; {result.compared} texts on each side "
        f"where the number matters; 95 % intervals. {_settings(result)} Scored in "
        f"{cost['seconds_scoring']:.0f} s, {cost['peak_bytes'] / 1e9:.1f} GB. Anchors "
        f"{result.anchors['digest'][:12]}."
    )


def _settings(result: Result) -> str:
    asked = result.asked
    body = f", {json.dumps(asked['body'])}" if asked["body"] else ""
    return (
        f"Temperature {asked['temperature']:g}, at most {asked['max_tokens']} tokens, seed "
        f"{asked['seed']}{body}."
    )


def _cut(result: Result) -> str:
    return f"Whole answers; their first {result.anchors['words']} words were measured."


def render(diversity: Any) -> str:
    return f"{diversity:g}" if isinstance(diversity, int | float) else json.dumps(diversity)


def _sides(result: Result) -> list[tuple[str, Any]]:
    levels = [(f"diversity {render(level.diversity)}", level.side) for level in result.levels]
    return [("human", result.human), *levels]


def _head(result: Result) -> list[str]:
    return ["", "", *(name for name, _ in _sides(result))]


def _score_rows(result: Result) -> list[list[str]]:
    def cell(score: Score, part: str, digits: int) -> str:
        return getattr(score, part).render(digits)

    return [
        [title, about, *(cell(side.score, part, digits) for _, side in _sides(result))]
        for title, part, digits, about in SCORE_PARTS
    ]


def _measure_rows(result: Result) -> list[list[str]]:
    return [
        [
            measure.title,
            measure.about,
            *(
                side.measures[name].render(measure.digits) if name in side.measures else "–"
                for _, side in _sides(result)
            ),
        ]
        for name, measure in MEASURES.items()
        if name in result.human.measures
    ]


_RUN_HEAD = (
    *("diversity", "texts", "too short", "cut", "unfinished"),
    *("tokens", "entropy, nats", "T"),
)
_ENDS = (
    f"{CUT_NOTE} They are in no measure. unfinished: texts that ended at the bound on their "
    "tokens; their first words are measured."
)


def _run_row(level: Level) -> list[str]:
    entropy = level.entropy
    return [
        render(level.diversity),
        f"{level.side.score.texts}",
        f"{level.side.score.short}",
        f"{level.cut}",
        f"{level.unfinished}",
        level.tokens.render(0),
        "off" if entropy is None else f"{entropy.before.render()} → {entropy.after.render()}",
        "–" if entropy is None else entropy.temperature.render(),
    ]


def _entropies(level: Level) -> Markup:
    entropy = level.entropy
    assert isinstance(entropy, Entropy)
    before, after = (
        [(i * BIN_NATS, count) for i, count in enumerate(counts)]
        for counts in (entropy.histogram_before, entropy.histogram_after)
    )
    return section(
        f"Mean entropy of the answers at diversity {render(level.diversity)}",
        note("Answers by their mean next-token entropy in nats: before, then after heating."),
        Markup('<div class="side">{}{}</div>').format(bars(before), bars(after)),
    )


def _phrases(result: Result) -> Markup:
    columns = [
        [f"{each.phrase} ({each.texts})" for each in side.repeated[:PHRASES]]
        for _, side in _sides(result)
    ]
    deepest = max(map(len, columns))
    rows = [[column[i] if i < len(column) else "" for column in columns] for i in range(deepest)]
    head = [name for name, _ in _sides(result)]
    return table(head, rows, range(len(head)))


def _samples(result: Result) -> list[Markup]:
    parts = []
    for place, (prompt, _) in enumerate(result.levels[0].samples):
        texts = joined(
            Markup('<div class="sample"><b>diversity {}</b>\n\n{}</div>').format(
                render(level.diversity), _shown(level.samples[place][1])
            )
            for level in result.levels
        )
        parts.append(Markup('<h3>{}</h3><div class="side">{}</div>').format(prompt[:300], texts))
    return parts


def _shown(text: str | None) -> str:
    return "(ended in its thinking)" if text is None else text


# ── The plot ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def _plot(result: Result) -> Markup:
    """A point a diversity, with its intervals: right is more varied, up is nearer to people."""
    sides = _sides(result)
    farthest = max(_high(side.measures["mmd_style"]) for _, side in sides)
    x = _Axis(0.0, 105.0, EDGE, WIDTH - 8)
    y = _Axis(0.0, 1.15 * max(farthest, 0.05), TOP, HEIGHT - EDGE)
    points = joined(
        _point(name, side.score.sds, side.measures["mmd_style"], x, y) for name, side in sides
    )
    across = joined(
        Markup('<text x="{:.0f}" y="{}">{}</text>').format(x.at(tick), HEIGHT - EDGE + 16, tick)
        for tick in (0, 20, 40, 60, 80, 100)
    )
    up = joined(
        Markup('<text x="4" y="{:.0f}">{:.2f}</text>').format(y.at(tick), tick)
        for tick in (y.high * i / 4 for i in range(5))
    )
    frame = Markup(
        f'<path d="M{EDGE} {TOP}V{HEIGHT - EDGE}H{WIDTH - 8}" fill="none" stroke="#999"/>'
        f'<text x="{WIDTH // 2 - 70}" y="{HEIGHT - 12}">Style Diversity Score →</text>'
        f'<text x="{EDGE + 6}" y="12">↑ style distance to human text (0 is at the top)</text>'
    )
    drawing = Markup(
        '<svg width="{}" height="{}" role="img" aria-label="diversity against distance">{}</svg>'
    )
    return drawing.format(WIDTH, HEIGHT, joined((frame, across, up, points)))


def _point(name: str, across: Estimate, up: Estimate, x: _Axis, y: _Axis) -> Markup:
    colour = "#228833" if name == "human" else "#4477aa"
    cx, cy = x.at(across.value), y.at(up.value)
    line = Markup(f'<path d="{{}}" stroke="{colour}" stroke-opacity=".5" stroke-width="1.5"/>')
    lines = []
    if across.low is not None and across.high is not None:
        lines.append(line.format(f"M{x.at(across.low):.1f} {cy:.1f}H{x.at(across.high):.1f}"))
    if up.low is not None and up.high is not None:
        lines.append(line.format(f"M{cx:.1f} {y.at(up.low):.1f}V{y.at(up.high):.1f}"))
    point = Markup(
        '{}<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"><title>{}</title></circle>'
        '<text x="{:.1f}" y="{:.1f}">{}</text>'
    )
    title = f"{name}: {across.render(1)}, {up.render(3)}"
    label = name.removeprefix("diversity ")
    return point.format(joined(lines), cx, cy, colour, title, cx + 7, cy - 6, label)


def _high(estimate: Estimate) -> float:
    return estimate.high if estimate.high is not None else estimate.value
