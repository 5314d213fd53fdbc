"""The demo's answers on a terminal and on one HTML page, with their marks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dftserve import page as html
from dftserve.demo.ask import LEVELS, PROMPTS, TIMES, Answer
from dftserve.demo.mark import ERROR, PHRASE, SHARED, Mark, Marked, can_find_errors, mark

STYLES = {SHARED: "yellow", PHRASE: "magenta", ERROR: "red underline"}
MEANING = {
    SHARED: "four words or more in a row that another answer to the same prompt also has",
    PHRASE: "an AI phrase: far more frequent in assistants' prose than in people's",
    ERROR: "an error of grammar or American spelling, according to Harper (“colour” is one)",
}
WHAT = (
    "At each step `diversity` first removes implausible tokens, and then samples the others at a "
    "higher temperature, which rises with their number. Stock sampling at temperature 1, next to "
    "it, removes nothing. Look for fewer errors than stock's: at .5 in answers that are less "
    "varied than stock's, at 1 in answers about as varied."
)
FEW = (
    "So few answers only show what kind of text to expect. Differences between the rows are partly "
    "chance: README.md has the results of 256 answers per row, with intervals."
)
SHOWN = 2
"""Answers of each cell on the terminal."""
CSS = Markup("""
<style>pre{white-space:pre-wrap}mark{color:#222;border-radius:2px}mark.shared{background:#ffe9a8}
mark.phrase{background:#efd0f5}
mark.error{color:inherit;background:none;border-bottom:2px solid #d33}
.answer{background:var(--panel);padding:.6rem .8rem;margin:.5rem 0;white-space:pre-wrap}
.side{grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}</style>
""")
HEAD = (
    "level",
    "shared words",
    "AI phrases per 1,000",
    "errors per 100",
    "different words",
    "entropy, nats",
    "temp.",
)
ENTROPY = (
    "entropy: the mean over steps, of the tokens that were not removed, before and after the heat; "
    "temp.: the mean temperature. Stock vLLM reports neither."
)


@dataclass(frozen=True)
class Stage:
    """One model's answers."""

    title: str
    answers: Sequence[Answer]

    def cell(self, prompt: str, level: float | None) -> list[Marked]:
        asked = (prompt, level)
        return _marked(tuple(a.text for a in self.answers if (a.prompt, a.level) == asked))


@cache
def _marked(texts: tuple[str, ...]) -> list[Marked]:
    return mark(texts)


def level_name(level: float | None) -> str:
    """The label of a level in tables; None: stock sampling."""
    return "stock, T 1" if level is None else f"diversity {level:g}"


# ── Terminal ─────────────────────────────────────────────────────────────────────────────────────


def on_terminal(stage: Stage, console: Console) -> None:
    """`SHOWN` answers of each cell, levels side by side, and the table of all of them."""
    console.rule(stage.title)
    for prompt in PROMPTS:
        console.print(f"\n[bold]{prompt}[/bold]")
        panels = [
            Panel(
                Text("\n· · ·\n").join(map(_styled, stage.cell(prompt, level)[:SHOWN])),
                title=level_name(level),
            )
            for level in LEVELS
        ]
        width = max(console.width // len(LEVELS) - 1, 20)
        console.print(Columns(panels, equal=True, width=width))
    console.print(_legend())
    console.print("Answers side by side have the same seed.")
    console.print(_table(stage))
    console.print(ENTROPY)
    console.print(FEW)


def _styled(marked: Marked) -> Text:
    text = Text(marked.text)
    for each in marked.marks:
        text.stylize(STYLES[each.kind], each.start, each.stop)
    return text


def _legend() -> Text:
    lines = [Text(f"{kind}: {MEANING[kind]}", style=STYLES[kind]) for kind in _kinds()]
    return Text("\n").join(lines)


def _kinds() -> list[str]:
    return [kind for kind in MEANING if kind != ERROR or can_find_errors()]


def _table(stage: Stage) -> Table:
    table = Table(title=f"{stage.title}: {TIMES} answers to each of {len(PROMPTS)} prompts")
    for name in HEAD:
        is_level = name == "level"
        table.add_column(name, justify="left" if is_level else "right", no_wrap=is_level)
    for row in rows(stage):
        table.add_row(*row)
    return table


def rows(stage: Stage) -> list[list[str]]:
    """The statistics of each level, in the columns of HEAD."""
    return [_row(stage, level) for level in LEVELS]


def _row(stage: Stage, level: float | None) -> list[str]:
    texts = [each for prompt in PROMPTS for each in stage.cell(prompt, level)]
    words = max(1, sum(each.words for each in texts))
    statistics = [a.statistics for a in stage.answers if a.level == level and a.statistics]
    return [
        level_name(level),
        f"{sum(each.words_in(SHARED) for each in texts) / words:.0%}",
        f"{1000 * sum(each.count(PHRASE) for each in texts) / words:.1f}",
        f"{100 * sum(each.count(ERROR) for each in texts) / words:.1f}"
        if can_find_errors()
        else "–",
        f"{fmean(_different(stage.cell(prompt, level)) for prompt in PROMPTS):.0%}",
        _entropy(statistics),
        f"{fmean(f['mean_temperature'] for f in statistics):.2f}" if statistics else "–",
    ]


def _different(texts: Sequence[Marked]) -> float:
    """Different words, as a share of all words in the answers to one prompt."""
    words = [word for each in texts for word in re.findall(r"[^\W\d_]+", each.text.lower())]
    return len(set(words)) / max(1, len(words))


def _entropy(statistics: Sequence[Mapping[str, float]]) -> str:
    if not statistics:
        return "–"
    before, after = (
        fmean(each[f"mean_entropy_{when}"] for each in statistics) for when in ("before", "after")
    )
    return f"{before:.2f} → {after:.2f}"


# ── Page ─────────────────────────────────────────────────────────────────────────────────────────


def as_page(stages: Iterable[Stage], notes: Sequence[str] = (), commands: str = "") -> str:
    """One self-contained HTML file.

    Args:
        commands: shown verbatim at the end.
    """
    kind_line = Markup('<p><mark class="{}">{}</mark> {}</p>')
    legend = html.joined(kind_line.format(kind, kind, MEANING[kind]) for kind in _kinds())
    sections = [
        html.section(
            stage.title,
            html.table(HEAD, rows(stage)),
            *(_prompt(stage, prompt) for prompt in PROMPTS),
        )
        for stage in stages
    ]
    above = map(html.note, (WHAT, ENTROPY, FEW, *notes))
    shown = Markup("<pre>{}</pre>").format(commands)
    return html.page("One small model, three diversities", CSS, legend, *above, *sections, shown)


def _prompt(stage: Stage, prompt: str) -> Markup:
    answer = Markup('<div class="answer">{}</div>')
    columns = html.joined(
        Markup("<div><h4>{}</h4>{}</div>").format(
            level_name(level),
            html.joined(answer.format(_html(each)) for each in stage.cell(prompt, level)),
        )
        for level in LEVELS
    )
    return Markup('<h3>{}</h3><div class="side">{}</div>').format(prompt, columns)


def _html(marked: Marked) -> Markup:
    """The text with its marks. They may overlap, so the text is split at every border, and a piece
    shows its most severe mark."""
    borders = {0, len(marked.text)}
    borders.update(at for each in marked.marks for at in (each.start, each.stop))
    cuts = sorted(borders)
    return html.joined(_piece(marked, start, stop) for start, stop in pairwise(cuts))


def _piece(marked: Marked, start: int, stop: int) -> str:
    text = marked.text[start:stop]
    over = [each for each in marked.marks if each.start <= start and stop <= each.stop]
    if not over:
        return text
    worst: Mark = max(over, key=lambda each: list(MEANING).index(each.kind))
    return Markup('<mark class="{}" title="{}">{}</mark>').format(worst.kind, worst.why, text)
