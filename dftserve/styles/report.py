"""Reports on a style profile: its phrases with their rates on both sides, and its automaton.

summary = inspect(load(Path("profiles/novels")))
print(as_text(summary))

A fit's page (`fit_html`) shows its rounds, and the phrases' rates in the last one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup
from scipy import stats

from dftserve.bounded_files import FileError, shaped_as
from dftserve.page import note, page, section, table
from dftserve.plots.figure import Figure, Span
from dftserve.plots.svg import svg
from dftserve.styles.counts import PER
from dftserve.styles.figures import Rates, by_round, phrase_rates
from dftserve.styles.profile import MANIFEST, Profile, ProfileError, Stored
from dftserve.styles.rounds import Fitted, Round, read, round_text

SHOWN = 20
"""Phrases that the text lists; the HTML page and the JSON list all."""
LEVEL = 0.95
"""Confidence level of the rates' intervals."""


@dataclass(frozen=True)
class Rate:
    """Occurrences per 1,000 words, and the interval of a Poisson count (Garwood 1936) at 95 %.

    The interval assumes independent occurrences; where a text repeats itself it is too narrow.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, words: int) -> "Rate":
        tail = (1 - LEVEL) / 2
        low = float(stats.chi2.ppf(tail, 2 * count)) / 2 if count else 0.0
        high = float(stats.chi2.ppf(1 - tail, 2 * count + 2)) / 2
        return cls(*(PER * n / words for n in (count, low, high)))

    @property
    def span(self) -> Span:
        return Span(self.value, self.low, self.high)

    def render(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """A phrase of a profile, as the summary shows it. Rates are per 1,000 words."""

    text: str
    log_ratio: float
    model: Rate
    human: Rate
    prompts: int | None
    """Number of the model's prompts under which the phrase occurs."""
    p: float | None
    known: bool


@dataclass(frozen=True)
class Summary:
    """What `dftserve style inspect` shows of a profile."""

    name: str
    model: str
    strength: float
    max_kl: float
    sizes: Mapping[str, int]
    """Sizes of the automaton and the tilt."""
    sides: Mapping[str, Mapping[str, int]]
    """Texts, words and prompts of each side."""
    recall: Mapping[str, Any]
    habits: Mapping[str, Any]
    rows: tuple[Row, ...]
    fit: Fitted | None
    """None where the profile was not fitted."""
    settings: Mapping[str, Any]
    versions: Mapping[str, str]


def inspect(stored: Stored) -> Summary:
    """The summary of a profile.

    Raises:
        ProfileError: the stored counts do not match the profile's phrases.
        ValueError: the stored fit is not what `dftserve style fit` writes.
    """
    profile, counts = stored.profile, stored.counts
    try:
        with shaped_as(MANIFEST, "the counts that `dftserve style build` writes"):
            sides = {name: dict(counts[name]) for name in ("model", "human")}
            rows = _rows(profile, list(counts["phrases"]), sides)
            recall, habits = dict(counts["recall"]), dict(counts["habits"])
            sizes = {
                "phrases": len(profile.phrases),
                "patterns": int(counts["patterns"]),
                "states": profile.states,
                "entries": len(profile.row_token_N),
                "unigrams": int(counts["unigrams"]),
                "bigrams": len(profile.bigram_token_M),
            }
    except FileError as error:
        raise ProfileError(str(error)) from None
    return Summary(
        name=profile.name,
        model=profile.model,
        strength=profile.strength,
        max_kl=profile.max_kl,
        sizes=sizes,
        sides=sides,
        recall=recall,
        habits=habits,
        rows=rows,
        fit=read(counts, MANIFEST),
        settings=dict(stored.settings),
        versions=dict(stored.versions),
    )


def _rows(
    profile: Profile,
    counted: Sequence[Mapping[str, Any]],
    sides: Mapping[str, Mapping[str, Any]],
) -> tuple[Row, ...]:
    """A row for each phrase; raises what reading counts of another form raises."""
    if len(counted) != len(profile.phrases):
        raise TypeError(f"{len(counted)} counts of {len(profile.phrases)} phrases")
    words = {name: max(int(side["words"]), 1) for name, side in sides.items()}
    return tuple(
        Row(
            text=phrase.text,
            log_ratio=phrase.log_ratio,
            model=Rate.of(int(of["model_count"]), words["model"]),
            human=Rate.of(int(of["human_count"]), words["human"]),
            prompts=of["prompts"],
            p=of["p"],
            known=bool(of["known"]),
        )
        for phrase, of in zip(profile.phrases, counted, strict=True)
    )


def as_json(summary: Summary) -> str:
    """The summary for a program."""
    return json.dumps(asdict(summary), indent=2, ensure_ascii=False)


def as_text(summary: Summary) -> str:
    """The summary for a terminal, with its first phrases only."""
    lines = [*_about(summary), ""]
    head = ("phrase", "λ", "model, per 1,000 words", "people, per 1,000 words")
    rows = [
        (row.text, f"{row.log_ratio:.2f}", row.model.render(), row.human.render())
        for row in summary.rows[:SHOWN]
    ]
    lines += _columns([head, *rows])
    if len(summary.rows) > SHOWN:
        lines.append(f"and {len(summary.rows) - SHOWN} more; --json and --html list all.")
    if summary.fit is not None:
        lines += ["", *map(round_text, summary.fit.rounds), f"The fit ended: {summary.fit.ended}."]
    return "\n".join([*lines, "", *_habit_lines(summary)])


def figures(summary: Summary) -> tuple[Figure, ...]:
    """The plots of a summary: rates of phrases, and the rounds of a fit."""
    rates = [Rates(row.text, row.model.span, row.human.span) for row in summary.rows]
    rounds = summary.fit.rounds if summary.fit is not None else ()
    return (
        *([phrase_rates({"the model": rates})] if rates else []),
        *(by_round(rounds) if rounds else []),
    )


def as_html(summary: Summary) -> str:
    """The summary as one page, with every phrase."""
    head = ("phrase", "λ, nats", "model", "people", "prompts", "p", "")
    rows = [
        (
            row.text,
            f"{row.log_ratio:.2f}",
            row.model.render(),
            row.human.render(),
            "" if row.prompts is None else f"{row.prompts}",
            "" if row.p is None else f"{row.p:.1e}",
            "known" if row.known else "",
        )
        for row in summary.rows
    ]
    openers = summary.habits.get("openers", {})
    return page(
        f"Style {summary.name}",
        Markup("").join(Markup("<p>{}</p>").format(line) for line in _about(summary)),
        *_plots(figures(summary)),
        *([] if summary.fit is None else [_rounds(summary.fit)]),
        section(
            "Phrases",
            note(
                "Per 1,000 words, with the 95 % interval of a Poisson count; at strength 1 a "
                "phrase occurs e^−λ times as often."
            ),
            table(head, rows, text=(0, 6)),
        ),
        section("Habits", *(Markup("<p>{}</p>").format(line) for line in _habit_lines(summary))),
        section(
            "How sentences begin",
            table(
                ("first word", "model", "people"),
                [
                    (word, f"{of['model']:.2%}", f"{of['human']:.2%}")
                    for word, of in openers.items()
                ],
            ),
        ),
    )


def fit_figures(profile: Profile, fitted: Fitted, rates: Sequence[Rate]) -> tuple[Figure, ...]:
    """The plots of a fit: its rounds, and each phrase's rate without the style and with it.

    Args:
        rates: the rate of each phrase in the last round.
    """
    phrases = list(zip(profile.phrases, rates, strict=True))
    series = {
        "the model without the style": [
            Rates(phrase.text, Span(phrase.model_rate), Span(phrase.human_rate))
            for phrase, _ in phrases
        ],
        f"with the profile of round {fitted.rounds[-1].number}": [
            Rates(phrase.text, rate.span, Span(phrase.human_rate)) for phrase, rate in phrases
        ],
    }
    return (*by_round(fitted.rounds), phrase_rates(series))


def fit_html(profile: Profile, fitted: Fitted, rates: Sequence[Rate]) -> str:
    """The report of a fit as one page."""
    rows = [
        (
            phrase.text,
            f"{phrase.log_ratio:.2f}",
            f"{phrase.model_rate:.3f}",
            rate.render(),
            f"{phrase.human_rate:.3f}",
        )
        for phrase, rate in zip(profile.phrases, rates, strict=True)
    ]
    head = ("phrase", "λ, nats", "without the style", "in the last round", "people")
    return page(
        f"The fit of the style {profile.name}",
        *_plots(fit_figures(profile, fitted, rates)),
        _rounds(fitted),
        section("Phrases in the last round", note(_LAST_ROUND), table(head, rows)),
    )


_LAST_ROUND = (
    "Per 1,000 words, on the fitted prompts, with the 95 % interval of a Poisson count. The rates "
    "without the style are from when the profile was built. λ is the frozen profile's: if a step "
    "was taken after the last round, no answers with it have been counted."
)
_ROUND_HEAD = (
    *("round", "words", "phrases per 1,000", "held-out prompts", "people"),
    *("above twice people's", "KL, nats per token", "largest step", "effective"),
)


def _rounds(fitted: Fitted) -> Markup:
    names = sorted({name for one in fitted.rounds for name in one.unfitted})
    rows = [
        (
            *_round_cells(one),
            *(f"{one.unfitted[n]:.3f}" if n in one.unfitted else "" for n in names),
        )
        for one in fitted.rounds
    ]
    return section(
        "Rounds of the fit",
        note(f"It ended: {fitted.ended}. The intervals are 95 % intervals of a Poisson count."),
        table((*_ROUND_HEAD, *names), rows),
    )


def _round_cells(one: Round) -> tuple[str, ...]:
    return (
        f"{one.number}",
        f"{one.words:,}",
        _with_interval(one.rate, one.interval),
        ""
        if one.held_out_rate is None
        else _with_interval(one.held_out_rate, one.held_out_interval),
        f"{one.human_rate:.2f}",
        f"{one.above}",
        "" if one.mean_kl is None else f"{one.mean_kl:.4f}",
        f"{one.largest_step:.2f}",
        f"{one.effective:.0%}",
    )


def _with_interval(value: float, interval: Sequence[float]) -> str:
    if not interval:
        return f"{value:.2f}"
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _plots(figures: Sequence[Figure]) -> list[Markup]:
    return [Markup("{}{}").format(note(each.about), svg(each)) for each in figures]


def _about(summary: Summary) -> list[str]:
    sizes, recall = summary.sizes, summary.recall
    model, human = summary.sides["model"], summary.sides["human"]
    return [
        f"{summary.name}: {sizes['phrases']:,} phrases that {summary.model} over-uses, and a tilt "
        f"of {sizes['unigrams']:,} tokens and {sizes['bigrams']:,} bigrams.",
        f"Counted on {model['words']:,} words of {model['texts']:,} answers to "
        f"{model['prompts']:,} prompts, and {human['words']:,} words of {human['texts']:,} texts "
        "by people.",
        f"Automaton: {sizes['states']:,} states and {sizes['entries']:,} entries of "
        f"{sizes['patterns']:,} tokenisations. {_recall_text(recall)}",
        f"Strength {summary.strength:g}; the tilt costs at most {summary.max_kl:g} nats per token.",
    ]


def _recall_text(recall: Mapping[str, Any]) -> str:
    if not recall["searched"]:
        return "None of them occurs in texts that it was not built from: its recall is unknown."
    return (
        f"It finds {recall['recall']:.1%} of {recall['searched']:,} occurrences in texts that it "
        f"was not built from; {recall['precision']:.1%} of its matches are occurrences."
    )


def _habit_lines(summary: Summary) -> list[str]:
    named = {"em_dashes": "Em dashes", "contrasts": "“Not X but Y”"}
    lines = [
        f"{title}: {of['model']:.2f} and {of['human']:.2f} per 1,000 words of the model's and "
        "people's (reported, not changed)."
        for name, title in named.items()
        if (of := summary.habits.get(name))
    ]
    begun = list(summary.habits.get("openers", {}).items())[:5]
    if begun:
        shares = ", ".join(f"{word} {of['model']:.1%} / {of['human']:.1%}" for word, of in begun)
        lines.append(f"Sentences begin with, model / people: {shares}.")
    return lines


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
