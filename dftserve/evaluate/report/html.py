"""An evaluation as one HTML file: its plots, every measure with its human value, the most repeated
phrases, and texts side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from dftserve import atomic
from dftserve.evaluate.metrics.sds import Score
from dftserve.evaluate.metrics.suite import MEASURES
from dftserve.evaluate.report.figures import Accuracy, figures, render, sides
from dftserve.evaluate.report.results import BIN_NATS, Entropy, Level, Result
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.page import bars, joined, note, page, section, table
from dftserve.plots.svg import svg

REPORT = "report.html"
PHRASES = 12
"""Number of repeated phrases that a report lists."""
SCORE_PARTS = (
    ("Style Diversity Score", "sds", 1, "100 · min(1, q) · min(1, V) · clip(P, 0, 1)"),
    ("V, style variance", "variety", 2, "√ of reliable variance between texts, human = 1"),
    ("P, wording", "wording", 2, "how little phrasing is shared, human = 1"),
    ("q, coherence", "coherence", 2, "share of texts whose word order carries meaning, human = 1"),
)


def write(result: Result, folder: Path, accuracy: Accuracy | None = None) -> None:
    """Write report.html into the folder of a result."""
    atomic.write_text(folder / REPORT, as_html(result, accuracy))


def as_html(result: Result, accuracy: Accuracy | None = None) -> str:
    """The report as one page without links to other files."""
    drawn = figures(result, accuracy)
    return page(
        f"{result.model}: style diversity",
        note(_about(result)),
        section(
            "Quality against diversity, and rates compared with human text",
            *(Markup("{}{}").format(note(each.about), svg(each)) for each in drawn),
        ),
        section("The score and its parts", table(_head(result), _score_rows(result), (0, 1))),
        section("Every measure", table(_head(result), _measure_rows(result), (0, 1))),
        section("At each diversity", table(_RUN_HEAD, map(_run_row, result.levels)), note(_ENDS)),
        *(_entropies(level) for level in result.levels if level.entropy is not None),
        section("Phrases that occur in the most texts", _phrases(result)),
        section("The same prompts", note(_cut(result)), *_samples(result)),
    )


def as_text(result: Result) -> str:
    """A summary for the terminal: the score, its parts and all measures."""
    lines = [f"{_about(result)}", "", _columns("", [n for n, _ in sides(result)])]
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


def _head(result: Result) -> list[str]:
    return ["", "", *(name for name, _ in sides(result))]


def _score_rows(result: Result) -> list[list[str]]:
    def cell(score: Score, part: str, digits: int) -> str:
        return getattr(score, part).render(digits)

    return [
        [title, about, *(cell(side.score, part, digits) for _, side in sides(result))]
        for title, part, digits, about in SCORE_PARTS
    ]


def _measure_rows(result: Result) -> list[list[str]]:
    return [
        [
            measure.title,
            measure.about,
            *(
                side.measures[name].render(measure.digits) if name in side.measures else "–"
                for _, side in sides(result)
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
    f"{CUT_NOTE} They are not measured. unfinished: texts that ended at the token limit; their "
    "first words are measured."
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
        for _, side in sides(result)
    ]
    deepest = max(map(len, columns))
    rows = [[column[i] if i < len(column) else "" for column in columns] for i in range(deepest)]
    head = [name for name, _ in sides(result)]
    return table(head, rows, range(len(head)))


def _samples(result: Result) -> list[Markup]:
    parts = []
    for index, (prompt, _) in enumerate(result.levels[0].samples):
        texts = joined(
            Markup('<div class="sample"><b>diversity {}</b>\n\n{}</div>').format(
                render(level.diversity), _shown(level.samples[index][1])
            )
            for level in result.levels
        )
        parts.append(Markup('<h3>{}</h3><div class="side">{}</div>').format(prompt[:300], texts))
    return parts


def _shown(text: str | None) -> str:
    return "(ended in its thinking)" if text is None else text
