"""A blind test by people: which of two texts did a person write, or which one is preferred?

    page(pairs, Path("blind.html"), seed=7, title="Stories")    # and blind.html.key.json
    print(verdict([Path("answers-….json")], Path("blind.html.key.json")).render())

Two-alternative forced choice. If the person's text is chosen in 1/2 of the judgments, within a
margin, the texts are as good as people's. Two one-sided exact binomial tests show this (TOST,
Schuirmann 1987); a test against 1/2 that is not significant does not.
"""

import hashlib
import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dftserve import atomic, settings
from dftserve.bounded_files import read_json
from dftserve.evaluate.metrics.intervals import Estimate, wilson
from dftserve.evaluate.preference.pairs import Pair

QUESTIONS: Mapping[str, str] = {
    "person": "Which was written by a person?",
    "preference": "Which do you prefer?",
}
KEY = ".key.json"
LARGEST = 64 << 20
"""Maximum size of a key, and of a judge's answers, in bytes."""
POWER = 0.8
"""The chance with which a test of the planned size shows equivalence if it holds exactly."""


@dataclass(frozen=True)
class Key:
    """Which text of each trial is the person's. It stays with whoever runs the test."""

    page: str
    question: str
    human: Mapping[str, int]
    """0 or 1 by trial: the index in the page's data, not the position on the screen."""

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise ValueError(
                f"question: got {self.question!r}; accepted: "
                f"{settings.accepted_names(self.question, QUESTIONS)}."
            )
        for trial, index in self.human.items():
            if index not in (0, 1):
                raise ValueError(f"human.{trial}: got {index!r}; accepted: 0 or 1.")


@dataclass(frozen=True)
class Answer:
    """One person's answer to one trial."""

    trial: str
    shown: tuple[int, ...]
    """The texts from left to right, by their indices in the page's data."""
    answer: str
    """Left or right."""
    seconds: float

    def __post_init__(self) -> None:
        if sorted(self.shown) != [0, 1]:
            raise ValueError(f"shown: got {list(self.shown)}; accepted: [0, 1] or [1, 0].")
        if self.answer not in ("left", "right"):
            raise ValueError(f"answer: got {self.answer!r}; accepted: left, right.")
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"seconds: got {self.seconds}; accepted: 0 or more.")

    @property
    def chosen(self) -> int:
        return self.shown[self.answer == "right"]


@dataclass(frozen=True)
class Answers:
    """One file of answers downloaded from the page."""

    page: str
    judge: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Verdict:
    """What the judgments of a blind test say about one of its questions."""

    question: str
    judgments: int
    judges: int
    trials: int
    """Trials that have an answer."""
    human: int
    """Judgments that chose the person's text; they are right if the question is who wrote it."""
    share: Estimate
    """Share of these judgments, with its Wilson interval; 0.5 is parity."""
    p_half: float
    """Exact two-sided binomial test of "the share is 1/2"."""
    margin: float
    level: float
    p_equivalent: float
    """The larger p of the two one-sided tests of "the share is `margin` or more from 1/2"."""
    needed: int
    """Independent judgments for `POWER` to show equivalence if it holds exactly."""
    left: float
    """Share of judgments that chose the text on the left."""
    median_seconds: float
    warnings: tuple[str, ...]

    @property
    def equivalent(self) -> bool:
        return self.p_equivalent < self.level

    def as_json(self) -> str:
        content = asdict(self) | {"equivalent": self.equivalent}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"

    def render(self) -> str:
        points = f"{100 * self.margin:g} points of parity"
        finding = "within" if self.equivalent else "not shown to be within"
        return "\n".join(
            [
                f"{QUESTIONS[self.question]} {self.judgments} judgments of {self.trials} trials by "
                f"{self.judges} judges",
                f"chose the person's text: {self.share.render()} (0.50 is parity; p against it "
                f"{self.p_half:.3g})",
                f"{finding} {points}: p {self.p_equivalent:.3g}, level {self.level:g}",
                f"for {POWER:.0%} power: {self.needed} independent judgments",
                f"chose the left: {self.left:.2f}; median {self.median_seconds:.0f} s a judgment",
                *(f"warning: {warning}" for warning in self.warnings),
            ]
        )


def page(
    pairs: Sequence[Pair], out: Path, *, seed: int, title: str, question: str = "person"
) -> None:
    """Write the test as one self-contained HTML file, and its key next to it.

    The page does not contain the key: keep that file to yourself, and choose a seed that a judge
    cannot guess. Texts are shown unchanged; make anything that gives them away but is not style,
    such as the kind of quotation marks or the length, equal beforehand.

    Args:
        out: the HTML file; the key is `out` + ".key.json".
        question: `person` or `preference`, of `QUESTIONS`.

    Raises:
        ValueError: no pairs, texts that are empty or equal, or an unknown question.
        FileExistsError: the page or the key exists: its answers would be lost.
    """
    data, key = _page_and_key(pairs, seed, question)
    key_file = out.with_name(out.name + KEY)
    for each in (out, key_file):
        if each.exists():
            raise FileExistsError(f"{each} exists; choose another place, or remove it.")
    template = (
        resources.files("dftserve.evaluate.preference")
        .joinpath("human_test.html")
        .read_text("utf-8")
    )
    parts = {"__TITLE__": escape(title), "__DATA__": _in_script(data)}
    # In one pass, so that a placeholder in a text is not replaced.
    html = re.sub("|".join(parts), lambda match: parts[match[0]], template)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(key_file, json.dumps(asdict(key), indent=1) + "\n")
    atomic.write_text(out, html)


def verdict(
    answer_files: Sequence[Path], key_file: Path, *, margin: float = 0.10, level: float = 0.05
) -> Verdict:
    """Join answers with the key and test them.

    Args:
        margin: how far from 1/2 a share still counts as parity.
        level: significance level of the test of equivalence.

    Raises:
        ValueError: a file of another format, answers to another page, two answers to a trial by the
            same judge, no answers, or numbers that are not accepted.
    """
    needed = judgments_needed(margin, level, POWER)
    key = settings.load(Key, _read(key_file), str(key_file))
    answers_by_judge = _joined(answer_files, key)
    if not answers_by_judge:
        raise ValueError("answers: got none; accepted: files with at least one judgment.")
    count = len(answers_by_judge)
    human = sum(answer.chosen == key.human[answer.trial] for _, answer in answers_by_judge)
    by_judge = Counter(judge for judge, _ in answers_by_judge)
    return Verdict(
        question=key.question,
        judgments=count,
        judges=len(by_judge),
        trials=len({answer.trial for _, answer in answers_by_judge}),
        human=human,
        share=wilson(human, count),
        p_half=float(stats.binomtest(human, count, 0.5).pvalue),
        margin=margin,
        level=level,
        p_equivalent=p_equivalent(human, count, margin),
        needed=needed,
        left=sum(answer.answer == "left" for _, answer in answers_by_judge) / count,
        median_seconds=statistics.median(answer.seconds for _, answer in answers_by_judge),
        warnings=tuple(
            _warnings(by_judge, len({answer.trial for _, answer in answers_by_judge}), needed)
        ),
    )


def p_equivalent(human: int, count: int, margin: float) -> float:
    """max of P(X ≥ human | 1/2 − margin) and P(X ≤ human | 1/2 + margin), X binomial."""
    too_low = stats.binom.sf(human - 1, count, 0.5 - margin)
    too_high = stats.binom.cdf(human, count, 0.5 + margin)
    return float(max(too_low, too_high))


def judgments_needed(margin: float, level: float, power: float) -> int:
    """The number of independent judgments from which on the exact test has at least this power to
    show equivalence if the share is 1/2. (At ±10 points and .05: 227 for .8, 281 for .9. The normal
    approximation, ((z(1−level) + z((1+power)/2)) / 2·margin)², gives 215 and 271.)

    Raises:
        ValueError: numbers that are not accepted.
    """
    for name, value, most in (("margin", margin, 0.5), ("level", level, 0.5), ("power", power, 1)):
        if not 0 < value < most:
            raise ValueError(f"{name}: got {value}; accepted: above 0, below {most}.")
    z = stats.norm.ppf(1 - level) + stats.norm.ppf((1 + power) / 2)
    # The power of an exact test is not monotonic: the last count that falls short decides.
    count_N = np.arange(1, int(2 * (z / (2 * margin)) ** 2) + 100)
    short = count_N[_power(count_N, margin, level) < power]
    return int(short[-1]) + 1


# ── The page ─────────────────────────────────────────────────────────────────────────────────────


def _page_and_key(pairs: Sequence[Pair], seed: int, question: str) -> tuple[dict[str, Any], Key]:
    """The page's data, and the key, which must not be in it."""
    if question not in QUESTIONS:
        raise ValueError(
            f"question: got {question!r}; accepted: {settings.accepted_names(question, QUESTIONS)}."
        )
    if not pairs:
        raise ValueError("pairs: got none; accepted: at least one.")
    for index, pair in enumerate(pairs):
        texts = pair.system.strip(), pair.human.strip()
        if not all(texts) or texts[0] == texts[1]:
            raise ValueError(f"pairs[{index}]: accepted: two texts, neither empty nor equal.")
    source = random.Random(seed)
    trials, human = [], {}
    for number, pair in enumerate(source.sample(pairs, len(pairs))):
        second = source.random() < 0.5
        texts = [pair.system, pair.human] if second else [pair.human, pair.system]
        name = _digest([number, pair.prompt, texts])
        trials.append({"id": name, "prompt": pair.prompt, "texts": texts})
        human[name] = int(second)
    data = {"ask": QUESTIONS[question], "trials": trials}
    data["id"] = _digest(data)
    return data, Key(data["id"], question, human)


def _digest(content: object) -> str:
    """A digest of what the page shows, which reveals nothing else to a judge."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _in_script(data: Mapping[str, Any]) -> str:
    """ASCII JSON in which an HTML parser finds no tags."""
    text = json.dumps(data)
    return text.translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"})


# ── The answers ──────────────────────────────────────────────────────────────────────────────────


def _joined(answer_files: Sequence[Path], key: Key) -> list[tuple[str, Answer]]:
    """(judge, answer) of all files."""
    answers_by_judge: list[tuple[str, Answer]] = []
    seen: dict[tuple[str, str], Path] = {}
    for file in answer_files:
        answers = settings.load(Answers, _read(file), str(file))
        if answers.page != key.page:
            raise ValueError(
                f"{file}: got answers to the page {answers.page}; the key is of {key.page}."
            )
        for answer in answers.answers:
            if answer.trial not in key.human:
                raise ValueError(
                    f"{file}: got the trial {answer.trial!r}, which is not in the key."
                )
            judgment = answers.judge, answer.trial
            if judgment in seen:
                raise ValueError(
                    f"{file}: got trial {answer.trial} by judge {answers.judge} again, after "
                    f"{seen[judgment]}; accepted: each once. Keep a judge's last file."
                )
            seen[judgment] = file
            answers_by_judge.append((answers.judge, answer))
    return answers_by_judge


def _read(path: Path) -> object:
    try:
        return read_json(path, largest=LARGEST)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or 'nothing there'}).") from None


def _warnings(by_judge: Counter[str], trials: int, needed: int) -> list[str]:
    """Why the verdict on a question may be unreliable, as sentences.

    Args:
        trials: the number of trials that have an answer.
    """
    count = by_judge.total()
    warnings = []
    judge, most = by_judge.most_common(1)[0]
    if 2 * most > count:
        warnings.append(
            f"judge {judge} gave {most} of {count} judgments; one person's are not independent, so "
            "the p values are too small."
        )
    if trials < count:
        warnings.append(
            f"{count} judgments of {trials} trials; those of one trial are of the same two texts "
            "and not independent, so the interval is too narrow and the p values are too small. "
            "Show each trial to one person, with as many trials as judgments are needed."
        )
    if count < needed:
        warnings.append(
            f"{count} judgments; {needed} are needed to show parity with {POWER:.0%} power."
        )
    return warnings


def _power(count_N: NDArray[np.intp], margin: float, level: float) -> NDArray[np.float64]:
    """The power of the two tests together if the share is 1/2: both reject if the person's text is
    chosen at least `least_N` and at most count − `least_N` times."""
    least_N = stats.binom.isf(level, count_N, 0.5 - margin) + 1
    inside_N = stats.binom.cdf(count_N - least_N, count_N, 0.5)
    return np.maximum(inside_N - stats.binom.cdf(least_N - 1, count_N, 0.5), 0.0)
