"""A real model's stories by sampling settings: variety, errors, and the trade-off between them.

    python bench/real_answers.py --model FOLDER            # first: the answers
    python bench/real.py [--folder build/real]

For each setting's answers to the story prompts, and for people's stories:
    errors      marks of a grammar checker per 100 words, without names
    unknown     lower-case words per 100 words that are in no dictionary
    phrases     AI phrases per 1,000 words
    self-BLEU, distinct-3   of windows of 120 words, between answers to different prompts
    alike       self-BLEU between the answers to one prompt
    style       √MMD² of style features to people's stories
    SDS         the Style Diversity Score, within prompts
and, for each sampling method, the errors at the variety (self-BLEU) of stock at temperature 1 and
the variety at the errors of stock at .7, interpolated between the method's settings. Intervals are
95 %, by leaving out a tenth of the prompts at a time; differences between settings are on the same
prompts. The last line is one JSON document.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from real_answers import (
    COOL,
    GATED,
    SETTINGS,
    STOCK,
    STORIES,
    Answer,
    data_folder,
    prompt_set,
    read_answers,
)

from dftserve.evaluate import reference
from dftserve.evaluate.benchmark import tasks
from dftserve.evaluate.metrics import errors, lexical, slop, two_sample
from dftserve.evaluate.metrics.intervals import Estimate, difference, from_left_out, jackknife
from dftserve.evaluate.metrics.sds import score
from dftserve.evaluate.metrics.stylometry import StyleSpace
from dftserve.evaluate.reference import Anchors
from dftserve.evaluate.text.tokenize import tokens
from dftserve.evaluate.text.windows import Sample, Windows

from provenance import machine, versions

RESULTS = Path(__file__).parent / "results"

PEOPLE = "people"
WAYS: Mapping[str, Sequence[str]] = {
    "stock, T": ("stock, T .2", "stock, T .5", COOL, STOCK, "stock, T 1.1", "stock, T 1.2"),
    "min-p and T": ("min-p .1, T 1.5", "min-p .05, T 1.5", "min-p .02, T 1.3"),
    "`gated`": ("`gated` .25", "`gated` .5", "`gated` .75", "`gated` 1"),
    "`words`": ("`words` .25", "`words` .5", "`words` .75", "`words` 1"),
}
"""The settings of each sampling method, from the least varied to the most."""


@click.command()
@click.option("--folder", default=Path("build/real"), type=click.Path(path_type=Path))
@click.option("--output", default=RESULTS / "real.json", type=click.Path(path_type=Path))
def main(folder: Path, output: Path) -> None:
    stories = prompt_set(STORIES, data_folder())
    people = reference.build(tasks.load("story").human)
    checks = Checks(people)
    rows = {PEOPLE: checks.of_people(len(stories.prompts))}
    for name, answers in by_setting(read_answers(folder), STORIES).items():
        rows[name] = checks.of_answers(answers, stories.prompts)
    document: dict[str, Any] = {
        "what": "stories of SmolLM2-135M-Instruct by sampling settings; 95 % intervals",
        "machine": machine(),
        "versions": versions("vllm", "transformers", "harper-py"),
        "prompts": len(stories.prompts),
        "answers_to_each": stories.answers,
        "max_tokens": stories.tokens,
        "settings": {name: SETTINGS[name] for name in rows if name != PEOPLE},
        "rows": {name: rounded(row) for name, row in rows.items()},
        "to_stock": against(rows, STOCK),
        "to_gated": against(rows, GATED),
        "at_equal": at_equal(rows),
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def against(rows: Mapping[str, Mapping[str, Estimate]], base: str) -> dict[str, Any]:
    """The difference of each setting to a base setting, on the same prompts."""
    return {
        name: rounded({key: difference(rows[base][key], row[key]) for key in row})
        for name, row in rows.items()
        if base in rows and name not in (PEOPLE, base)
    }


def by_setting(answers: Sequence[Answer], prompt_set: str) -> dict[str, list[Answer]]:
    """The answers to one set of prompts by their setting, in the order of `SETTINGS`."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.prompt_set == prompt_set:
            found.setdefault(answer.setting, []).append(answer)
    return {name: found[name] for name in SETTINGS if name in found}


def texts_of(output: Path) -> Path:
    """The file for the answers behind a result: in results/texts, or next to a result elsewhere."""
    name = f"{output.stem}.jsonl.xz"
    is_ours = output.parent.resolve() == RESULTS.resolve()
    return RESULTS / "texts" / name if is_ours else output.with_name(name)


def rounded(row: Mapping[str, Estimate]) -> dict[str, Any]:
    """Estimates in JSON types, to four digits."""
    return {
        name: {
            "value": round(found.value, 4),
            "low": None if found.low is None else round(found.low, 4),
            "high": None if found.high is None else round(found.high, 4),
        }
        for name, found in row.items()
    }


# ── Measures ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Counts:
    """Counts over the answers to one prompt."""

    words: int
    marks: int
    unknown: int
    phrases: int


class Checks:
    """Measures the answers of settings, with instruments that are built once."""

    def __init__(self, people: Anchors) -> None:
        self._people = people
        self._space = StyleSpace.fit(people.splits["reference"])
        self._human_NF = self._space.features(people.splits["calibration"])
        self._linter = errors.linter()
        self._phrases = slop.read_phrases(slop.OURS)

    def of_people(self, set_size: int) -> dict[str, Estimate]:
        """Measures of people's stories. Each has its own prompt, with one answer; wording is
        compared within sets of `set_size`, as for a model."""
        windows = self._people.test.whole()
        windows = windows.pick(range(len(windows) // set_size * set_size))
        index_T = np.arange(len(windows))
        tokens_T = [tokens(text) for text in windows.texts]
        return {
            **rates([self._counts([text]) for text in windows.texts]),
            **between(index_T // set_size, index_T, tokens_T, len(windows)),
            **self._style(windows, index_T, len(windows)),
            "sds": score(windows, self._people.sds_reference).sds,
        }

    def of_answers(self, answers: Sequence[Answer], prompts: Sequence[str]) -> dict[str, Estimate]:
        """`answers`: the same number for each prompt."""
        answers = sorted(answers, key=lambda answer: (answer.prompt, answer.number))
        count = 1 + answers[-1].prompt
        counts = [
            self._counts([answer.text for answer in answers if answer.prompt == prompt])
            for prompt in range(count)
        ]
        windows = Windows.of(Sample(a.text, prompts[a.prompt]) for a in answers)
        long = [index for index, text in enumerate(windows.texts) if text]
        tokens_T = [tokens(windows.texts[index]) for index in long]
        number_T = np.array([answers[index].number for index in long])
        prompt_T = np.array([answers[index].prompt for index in long])
        return {
            **rates(counts),
            **between(number_T, prompt_T, tokens_T, count),
            "alike": within(prompt_T, tokens_T, count),
            **self._style(windows.pick(long), prompt_T, count),
            "sds": score(windows, self._people.sds_reference).sds,
            "short": jackknife(
                count, lambda at: 1 - np.isin(prompt_T, at).sum() * count / len(at) / len(answers)
            ),
        }

    def _counts(self, texts: Sequence[str]) -> Counts:
        checked = [errors.check(text, self._linter) for text in texts]
        return Counts(
            words=sum(each.words for each in checked),
            marks=sum(each.marks for each in checked),
            unknown=sum(each.unknown for each in checked),
            phrases=sum(len(list(self._phrases.found(text))) for text in texts),
        )

    def _style(self, windows: Windows, prompt_T: NDArray, count: int) -> dict[str, Estimate]:
        style_TF = self._space.features(windows)

        def squared(at: NDArray[np.intp]) -> float:
            chosen_T = np.isin(prompt_T, at)
            return two_sample.mmd2(style_TF[chosen_T], self._human_NF, self._space.sigma)

        return {"style": two_sample.mmd_from_squared(jackknife(count, squared))}


def rates(counts: Sequence[Counts]) -> dict[str, Estimate]:
    """Marks, unknown words and AI phrases of a setting, by the names of the result's columns.

    Args:
        counts: of one prompt each.
    """
    counts_P4 = np.array([[c.words, c.marks, c.unknown, c.phrases] for c in counts], float)

    def rate(column: int, per: int) -> Estimate:
        return jackknife(
            len(counts), lambda at: per * counts_P4[at, column].sum() / counts_P4[at, 0].sum()
        )

    return {"errors": rate(1, 100), "unknown": rate(2, 100), "phrases": rate(3, 1000)}


def between(
    number_T: NDArray, prompt_T: NDArray, tokens_T: Sequence[Sequence[str]], count: int
) -> dict[str, Estimate]:
    """Measures between the answers with the same number, which have different prompts; the mean
    over the numbers."""

    def each(statistic: Callable[[list[Sequence[str]]], float]) -> Estimate:
        def mean(at: NDArray[np.intp]) -> float:
            chosen_T = np.isin(prompt_T, at)
            sets = [np.flatnonzero(chosen_T & (number_T == n)) for n in np.unique(number_T)]
            return float(np.mean([statistic([tokens_T[int(i)] for i in texts]) for texts in sets]))

        return jackknife(count, mean)

    return {
        "self_bleu": each(lexical.self_bleu),
        "distinct_3": each(lambda texts: lexical.distinct_n(texts, 3)),
    }


def within(prompt_T: NDArray, tokens_T: Sequence[Sequence[str]], count: int) -> Estimate:
    """Self-BLEU between the answers to one prompt; the mean over prompts with two or more."""
    sets = [[tokens_T[int(i)] for i in np.flatnonzero(prompt_T == p)] for p in range(count)]
    bleu_P = np.array([lexical.self_bleu(s) if len(s) > 1 else np.nan for s in sets])
    return jackknife(count, lambda at: float(np.nanmean(bleu_P[at])))


# ── Errors at equal variety, variety at equal errors ─────────────────────────────────────────────


def at_equal(rows: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """The comparisons for each sampling method whose settings span the point on both sides."""
    asked = {
        "errors_at_variety_of_stock": ("self_bleu", "errors", STOCK),
        "variety_at_errors_of_cool": ("errors", "self_bleu", COOL),
    }
    found: dict[str, Any] = {}
    for way, names in WAYS.items():
        curve = [rows[name] for name in names if name in rows]
        each = {
            question: read_at(curve, key, value, rows[at])
            for question, (key, value, at) in asked.items()
            if at in rows and len(curve) > 1
        }
        found[way] = rounded({name: known for name, known in each.items() if known is not None})
    return found


def read_at(
    curve: Sequence[Mapping[str, Estimate]], key: str, asked: str, at: Mapping[str, Estimate]
) -> Estimate | None:
    """The value of `asked` where `key` is as in `at`, interpolated between a curve's settings on a
    log scale; None if the settings do not span that point, with or without one of the tenths."""
    draws = range(len(at[key].left_out))

    def read(value_of: Callable[[Estimate], float]) -> float:
        points = sorted((value_of(row[key]), value_of(row[asked])) for row in curve)
        keys, values = (np.log([point[side] for point in points]) for side in (0, 1))
        wanted = np.log(value_of(at[key]))
        return float(np.exp(np.interp(wanted, keys, values, left=np.nan, right=np.nan)))

    value = read(lambda found: found.value)
    left_out = [read(lambda found, draw=draw: found.left_out[draw]) for draw in draws]
    return from_left_out(value, left_out) if np.isfinite([value, *left_out]).all() else None


if __name__ == "__main__":
    main()
