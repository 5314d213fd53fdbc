"""An evaluation from answers to report, and the comparison of two."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.evaluate import reference
from dftserve.evaluate.accuracy.compare import Answered
from dftserve.evaluate.accuracy.compare import compare as compare_accuracy
from dftserve.evaluate.accuracy.report import read as read_accuracy
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.metrics import lexical, suite
from dftserve.evaluate.metrics.intervals import Estimate, part_numbers
from dftserve.evaluate.metrics.slop import Phrases, read_phrases
from dftserve.evaluate.metrics.suite import MEASURES, _clipped
from dftserve.evaluate.report.compare import compare
from dftserve.evaluate.report.figures import Accuracy, figures
from dftserve.evaluate.report.html import as_html, as_text
from dftserve.evaluate.run import Answer, Instruments, RequestGrid, StyleSpace, assess, server
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.evaluate.text.tokenize import tokens
from dftserve.evaluate.text.windows import LEAST_TEXTS, Sample, Windows
from tests.texts import human_like

TEXTS = 24


@pytest.fixture(scope="module")
def anchors():
    return reference.build([Sample(text) for text in human_like(160)])


@pytest.fixture(scope="module")
def instruments(anchors):
    return Instruments(StyleSpace.fit(anchors.splits["reference"]), read_phrases(), None)


def request_grid(**changes) -> RequestGrid:
    prompts = tuple(Prompt(f"Prompt {number} <script>") for number in range(TEXTS))
    values = {"model": "a & b", "prompts": prompts, "grid": (0.0, 0.5), "samples": 1}
    return RequestGrid(**{**values, **changes})


def answers(texts: list[str], level: int, statistics=None) -> list[Answer]:
    return [Answer(level, i, 0, text, "stop", 200 + i, statistics) for i, text in enumerate(texts)]


STATISTICS = {
    "mean_entropy_before": 1.0,
    "mean_entropy_after": 1.5,
    "mean_temperature": 1.2,
    "tokens_changed": 0.1,
}


@pytest.fixture(scope="module")
def result(anchors, instruments):
    """Half of the answers at level 0 are one text; those at level .5 are like human text."""
    people = human_like(TEXTS, seed=7)
    same = [people[0]] * (TEXTS // 2) + people[: TEXTS // 2]
    replies = [*answers(same, 0), *answers(people, 1, STATISTICS)]
    return assess(request_grid(), replies, anchors, "digest", instruments)


def test_a_varied_level_scores_higher_than_a_monotonous_one(result):
    same, people = (level.side for level in result.levels)
    assert people.score.sds.value > 60 > 40 > same.score.sds.value
    assert people.score.sds.low > same.score.sds.high
    assert people.measures["self_bleu"].high < same.measures["self_bleu"].low
    assert people.measures["mmd_style_p"].value > 0.001


def test_every_measure_has_an_interval_and_a_human_value(result):
    for level in result.levels:
        assert set(level.side.measures) == set(result.human.measures)
        for name, value in level.side.measures.items():
            if name != "mmd_style_p":
                assert value.low <= value.value + 1e-9, name
                assert value.value <= value.high + 1e-9, name
    assert set(result.human.measures) <= set(MEASURES)


@pytest.mark.parametrize(
    ("name", "statistic"),
    [("self_bleu", lexical.self_bleu), ("self_repetition", lexical.self_repetition)],
)
def test_a_text_that_is_left_out_is_no_reference_either(instruments, name, statistic):
    """With it as a reference, the interval would be half as wide: each text is compared with all
    others, and is also what the others are compared with."""
    people = human_like(TEXTS, seed=7)
    texts = Windows.of([Sample(text, f"prompt {i // 3}") for i, text in enumerate(people)])
    found = suite.measure(texts, Windows.of(map(Sample, people)), instruments)[name]
    tokens_T = [tokens(text) for text in texts.texts]
    part_T = part_numbers(TEXTS, texts.groups)
    wanted = [
        statistic([own for own, its in zip(tokens_T, part_T, strict=True) if its != part])
        for part in range(TEXTS // 3)
    ]
    assert found.left_out == pytest.approx(wanted)
    assert found.value == pytest.approx(statistic(tokens_T))


def test_no_interval_leaves_the_range_of_its_measure(result):
    """Half of one level is the same text: leaving out a tenth changes its measures a lot."""
    for side in (result.human, *(level.side for level in result.levels)):
        for name, found in side.measures.items():
            least, most = MEASURES[name].least, MEASURES[name].most
            assert least <= found.value <= most, name
            if found.low is not None and found.high is not None:
                assert least <= found.low <= found.high <= most, name
    wide = _clipped(Estimate(0.95, 0.8, 1.1), MEASURES["c2st_style"])
    assert (wide.low, wide.high) == (0.8, 1.0)


def test_entropies_are_those_of_the_answers(result):
    off, on = (level.entropy for level in result.levels)
    assert off is None
    assert (on.before.value, on.after.value, on.temperature.value) == pytest.approx((1, 1.5, 1.2))
    assert on.histogram_before[4] == on.histogram_after[6] == TEXTS


def test_the_report_escapes_markup_and_loads_nothing(result):
    html = as_html(result)
    assert "<script" not in html, "text of models and users is escaped"
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert not re.search(r'(src|href)="?http', html), "it loads nothing"
    shown = result.levels[1].side.score.sds.render(1)
    assert shown in html
    assert shown in as_text(result)


# ── Plots ────────────────────────────────────────────────────────────────────────────────────────


def ends(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.low, estimate.value, estimate.high


def drawn_ends(span) -> tuple[float | None, ...]:
    return span.low, span.value, span.high


def test_plots_show_every_level_with_its_intervals_and_the_human_values(result):
    drawn = {each.name: each for each in figures(result)}
    assert list(drawn) == ["distance", "quality", "ai-phrases", "not-x-but-y"]
    everyone = [result.human, *(level.side for level in result.levels)]
    wanted = {
        "distance": [(side.score.sds, side.measures["mmd_style"]) for side in everyone],
        "quality": [(side.score.variety, side.score.coherence) for side in everyone],
    }
    for name, pairs in wanted.items():
        people, levels = drawn[name].series
        assert (people.is_human, levels.is_human) == (True, False)
        found = [(drawn_ends(p.x), drawn_ends(p.y)) for p in (*people.points, *levels.points)]
        assert found == [(ends(x), ends(y)) for x, y in pairs]
    for name, measure in (("ai-phrases", "slop"), ("not-x-but-y", "contrast")):
        (series,), (line,) = drawn[name].series, drawn[name].references
        found = [drawn_ends(point.y) for point in series.points]
        assert found == [ends(level.side.measures[measure]) for level in result.levels]
        assert drawn_ends(line.span) == ends(result.human.measures[measure])
        labels = [tick.label for tick in drawn[name].x.ticks]
        assert [labels[int(point.x.value)] for point in series.points] == ["0", "0.5"]


def test_only_a_level_without_a_value_has_no_point(result):
    low, high = result.levels
    measures = {**low.side.measures, "slop": Estimate(float("nan"), None, None)}
    bare = replace(result, levels=(replace(low, side=replace(low.side, measures=measures)), high))
    rates = next(each for each in figures(bare) if each.name == "ai-phrases")
    assert [point.x.value for point in rates.series[0].points] == [1.0]
    assert [tick.label for tick in rates.x.ticks] == ["0", "0.5"]


def test_the_report_has_each_plot_as_svg_with_its_values(result):
    html = as_html(result)
    plots = re.findall(r"<svg xmlns.*?</svg>", html, re.DOTALL)
    for figure, plot in zip(figures(result), plots, strict=True):
        root = ElementTree.fromstring(plot)
        texts = {element.text for element in root.iter()}
        assert figure.title in texts
        assert {point.description for series in figure.series for point in series.points} <= texts
    assert len(set(re.findall(r' id="([^"]*)"', html))) == 2 * len(plots)


def accuracy_report(path: Path, right: dict[str, dict[float, list[bool]]]) -> Path:
    """Write what `evaluate accuracy` writes, for questions with one answer each."""
    tasks = [
        compare_accuracy(task, {level: answered(outcomes) for level, outcomes in levels.items()})
        for task, levels in right.items()
    ]
    settings = {"model": "a & b", "temperature": 1.0}
    content = {"settings": settings, "tasks": [each.as_json() for each in tasks]}
    path.write_text(json.dumps(content))
    return path


def answered(right: list[bool]) -> list[Answered]:
    return [Answered(f"q{n}", (is_right,), ("",), ("A",)) for n, is_right in enumerate(right)]


RIGHT = {
    "mmlu": {0: [True] * 8 + [False] * 2, 0.5: [True] * 6 + [False] * 4, 1: [False] * 10},
    "gsm8k": {0: [True] * 10, 0.5: [True] * 5 + [False] * 5},
}


def test_accuracy_is_plotted_over_the_score_of_the_same_diversity(result, tmp_path):
    accuracy = read_accuracy(accuracy_report(tmp_path / "accuracy.json", RIGHT))
    plot = next(each for each in figures(result, accuracy) if each.name == "accuracy")
    scores = [ends(level.side.score.sds) for level in result.levels]
    assert [series.name for series in plot.series] == ["mmlu", "gsm8k"]
    for series, shares in zip(plot.series, ((80, 60), (100, 50)), strict=True):
        assert [drawn_ends(point.x) for point in series.points] == scores
        assert [point.y.value for point in series.points] == pytest.approx(shares)
        for point, share in zip(series.points, shares, strict=True):
            assert 0 <= point.y.low <= share <= point.y.high + 1e-9
    assert drawn_ends(plot.references[0].span) == ends(result.human.score.sds)
    assert "Accuracy against diversity" in as_html(result, accuracy)


@pytest.mark.parametrize(
    ("grid", "temperature", "message"),
    [
        ([0.5, True, {"strength": 1}], 1.0, "got mmlu at the diversities 0, none of them"),
        ([0.0], 1.0, "got gsm8k at the diversities 1, none of them"),
        ([0.0, 1.0], 0.7, "at temperature 1, and this run is at 0.7"),
    ],
)
def test_accuracy_at_other_diversities_or_another_temperature_is_refused(
    grid, temperature, message
):
    of_task = Estimate(0.5, 0.4, 0.6)
    accuracy = Accuracy("m", 1.0, {"mmlu": {0.0: of_task}, "gsm8k": {1.0: of_task}})
    accuracy.check([0.0, 1.0, {"strength": 1}], 1.0)
    with pytest.raises(ValueError, match=message):
        accuracy.check(grid, temperature)


def test_a_file_that_is_not_an_accuracy_report_is_refused(tmp_path):
    path = tmp_path / "accuracy.json"
    with pytest.raises(FileNotFoundError, match="evaluate accuracy --out FILE"):
        read_accuracy(path)
    whole = json.loads(accuracy_report(path, RIGHT).read_text())
    wrong = [{}, {**whole, "tasks": []}, {**whole, "tasks": [{"task": "mmlu", "levels": [3]}]}]
    wrong.append({**whole, "tasks": [{"task": str(n), "levels": []} for n in range(6)]})
    level = {"diversity": "high", "accuracy": {"value": 1.0, "low": None, "high": None}}
    wrong.append({**whole, "tasks": [{"task": "mmlu", "levels": [level]}]})
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"accuracy\.json.*accepted"):
            read_accuracy(path)


# ── Pairs ────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_does_not_differ_from_itself(result, tmp_path):
    path = write(result, tmp_path / "a.json")
    compared = compare(path, path)
    for _, rows in compared.levels:
        for row in rows:
            if row.difference.low is not None and row.title != "style classifier":
                assert row.difference.value == 0
                assert abs(row.difference.high - row.difference.low) < 1e-9 or row.title in UNPAIRED
    assert "b − a" in compared.render()
    assert json.loads(compared.as_json())["a"] == "a & b"


UNPAIRED = (
    *("style classifier", "AI phrases", "“not X, but Y”"),
    *("V, style variance", "P, wording", "q, coherence"),
)


def write(result, path: Path) -> Path:
    path.write_text(result.as_json())
    return path


def test_a_paired_interval_is_narrower_than_that_of_one_model(anchors, instruments, tmp_path):
    """Of the score, for two models with the same texts except for two."""
    people = human_like(TEXTS, seed=7)
    nearly = [*people[:-2], *human_like(2, seed=9)]
    one = request_grid(grid=(0.0,))
    paths = [
        write(assess(one, answers(texts, 0), anchors, "d", instruments), tmp_path / f"{i}.json")
        for i, texts in enumerate((people, nearly))
    ]
    row = compare(*paths).levels[0][1][0]
    assert row.difference.high - row.difference.low < row.a.high - row.a.low


def test_the_interval_of_a_difference_of_scores_is_that_of_as_many_texts(result, tmp_path):
    """If one run scores the same in each resample, it is the interval of the other."""
    first = write(result, tmp_path / "a.json")
    given = json.loads(first.read_text())
    for level in given["levels"]:
        level["side"]["score"]["drawn"] = [0.0] * len(level["side"]["score"]["drawn"])
        level["side"]["score"]["sds"]["value"] = 0.0
    (tmp_path / "b.json").write_text(json.dumps(given))
    for _, rows in compare(tmp_path / "b.json", first).levels:
        score = rows[0]
        assert ends(score.difference) == pytest.approx(ends(score.b), abs=0.01)


def test_runs_that_left_out_different_prompts_are_not_paired(result, tmp_path):
    """As when one of them has a text that was too short to be measured, or is of a version that did
    not record them."""
    first = write(result, tmp_path / "a.json")
    other = json.loads(first.read_text())
    shown = {"same": compare(first, first)}
    for name, parts in (("other", "0" * 16), ("unrecorded", "")):
        for level in other["levels"]:
            for found in level["side"]["measures"].values():
                found["parts"] = parts
        (tmp_path / "b.json").write_text(json.dumps(other))
        shown[name] = compare(first, tmp_path / "b.json")
    widths = {
        name: next(row.difference for row in each.levels[0][1] if row.title == "self-BLEU")
        for name, each in shown.items()
    }
    assert widths["same"].high == widths["same"].low == 0
    assert widths["other"].high == widths["unrecorded"].high > 0


@pytest.mark.parametrize(
    ("field", "other", "depending"),
    [
        (
            "compared",
            12,
            {"self-BLEU", "distinct-1", "self-repetition", "Vendi, style", "token JS"},
        ),
        ("embeddings", "B", {"meaning distance", "Vendi, meaning", "distinct of 8"}),
        ("phrases", "0" * 64, {"AI phrases"}),
    ],
)
def test_what_depends_on_a_difference_of_the_runs_is_left_out_with_the_reason(
    result, tmp_path, field, other, depending
):
    given = json.loads(result.as_json()) | {"embeddings": "A"}
    for side in (given["human"], *(level["side"] for level in given["levels"])):
        meaning = ("mmd_meaning", "vendi_meaning", "distinct_8")
        side["measures"] |= {name: side["measures"]["mmd_style"] for name in meaning}
    for level in given["levels"]:
        level["side"]["measures"]["slop"]["value"] = given["human"]["measures"]["slop"]["value"] + 1
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(given))
    second.write_text(json.dumps(given | {field: other}))
    same, found = compare(first, first), compare(first, second)
    assert same.notes == ()
    (note,) = found.notes
    assert note.startswith("Left out: ")
    assert f"`{field}`" in note
    for (_, all_rows), (_, rows) in zip(same.levels, found.levels, strict=True):
        titles, kept = ({row.title for row in each} for each in (all_rows, rows))
        assert depending <= titles - kept
        assert all(title in note for title in titles - kept)
        assert {"Style Diversity Score", "style distance", "“not X, but Y”"} <= kept
    assert note in found.render()
    assert ("of the way from a to human" in found.render()) == (field != "phrases")


def test_the_digest_of_phrases_is_that_of_the_set():
    phrases = ["a testament to", "rich tapestry", "a tapestry"]
    assert Phrases.of(phrases).digest == Phrases.of(phrases[::-1]).digest
    assert Phrases.of(phrases).digest != Phrases.of(phrases[1:]).digest


def test_a_single_prompt_gives_no_p_value(anchors, instruments):
    """Its answers are one group: there is nothing to permute."""
    people = human_like(TEXTS, seed=7)
    one = request_grid(prompts=(Prompt("Only one."),), grid=(0.0,), samples=TEXTS)
    replies = [Answer(0, 0, number, text, "stop", 200, None) for number, text in enumerate(people)]
    measures = assess(one, replies, anchors, "d", instruments).levels[0].side.measures
    assert {"mmd_style_p", "c2st_style"}.isdisjoint(measures)
    assert "mmd_style" in measures


def test_a_score_within_prompts_and_one_between_texts_cannot_be_compared(result, tmp_path):
    """As when so many answers of one run were cut that its prompts have too few to compare."""
    first = write(result, tmp_path / "a.json")
    other = json.loads(first.read_text())
    for level in other["levels"]:
        score = level["side"]["score"]
        score["by_prompt"] = not score["by_prompt"]
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="within prompts"):
        compare(first, tmp_path / "b.json")


def test_a_report_says_if_only_some_diversities_are_compared_within_prompts(result):
    low, high = result.levels
    score = replace(high.side.score, by_prompt=not high.side.score.by_prompt)
    mixed = replace(result, levels=(low, replace(high, side=replace(high.side, score=score))))
    assert "within prompts at some diversities only" in as_text(mixed)
    assert "at some diversities only" not in as_text(result)


def test_runs_with_different_prompts_or_anchors_cannot_be_compared(
    result, anchors, instruments, tmp_path
):
    people = human_like(TEXTS, seed=7)
    replies = [*answers(people, 0), *answers(people, 1)]
    other = request_grid(prompts=tuple(Prompt(f"Other {number}") for number in range(TEXTS)))
    first = write(result, tmp_path / "a.json")
    second = write(assess(other, replies, anchors, "digest", instruments), tmp_path / "b.json")
    with pytest.raises(ValueError, match="prompts"):
        compare(first, second)
    third = write(
        assess(request_grid(), replies, anchors, "another", instruments), tmp_path / "c.json"
    )
    with pytest.raises(ValueError, match="anchors"):
        compare(first, third)
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match=r"d\.json"):
        compare(first, tmp_path / "d.json")


def test_texts_that_are_too_short_are_reported(anchors, instruments):
    short = [text[:200] for text in human_like(TEXTS, seed=7)]
    with pytest.raises(ValueError, match=r"0 of 24.*max-tokens"):
        assess(request_grid(grid=(0.0,)), answers(short, 0), anchors, "d", instruments)


THINKING = (None, "<think>He wants a story. Let me", "</think>", "<think>a</think>\n<think>b")
"""What servers with and without a parser of thinking return if the tokens end inside it."""


def with_cut(replies: list[Answer]) -> list[Answer]:
    """The same answers, and others that ended in their thinking."""
    cut = [
        Answer(replies[0].level, TEXTS + i, 0, text, "length", 1024, None)
        for i, text in enumerate(THINKING)
    ]
    return [*cut, *replies]


def larger_request_grid() -> RequestGrid:
    prompts = tuple(Prompt(f"Prompt {number}") for number in range(TEXTS + len(THINKING)))
    return request_grid(grid=(0.0,), prompts=prompts)


def test_answers_cut_in_their_thinking_are_counted_but_not_measured(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    plain = assess(larger_request_grid(), people, anchors, "d", instruments).levels[0]
    result = assess(larger_request_grid(), with_cut(people), anchors, "d", instruments)
    level = result.levels[0]
    assert (level.cut, level.unfinished, plain.cut) == (len(THINKING), 0, 0)
    assert (level.side.measures, level.tokens) == (plain.side.measures, plain.tokens)
    assert values(level) == values(plain)
    score = level.side.score
    assert (score.texts, score.short) == (TEXTS, 0), "nor are they counted as short"
    assert json.loads(result.as_json())["levels"][0]["cut"] == len(THINKING)
    lines = as_text(result).splitlines()
    assert ["cut", "–", "4"] in [line.split() for line in lines]
    assert lines[-1] == CUT_NOTE
    assert CUT_NOTE in as_html(result)


def values(level) -> list[float]:
    """The score and its parts, without the intervals, whose resamples have other texts."""
    score = level.side.score
    return [each.value for each in (score.sds, score.variety, score.wording, score.coherence)]


@pytest.fixture(scope="module")
def anchors_in_prompts():
    return reference.build(
        [Sample(text, f"asked {i % 16}") for i, text in enumerate(human_like(160, seed=3))]
    )


def answers_to(prompts: int, samples: int) -> list[Answer]:
    texts = iter(human_like(prompts * samples, seed=5))
    return [
        Answer(0, place, sample, next(texts), "stop", 200, None)
        for place in range(prompts)
        for sample in range(samples)
    ]


def test_a_prompt_with_one_cut_answer_is_still_scored(anchors_in_prompts, instruments):
    """Eight answers to it were given, as many as texts compared within prompts need."""
    replies = answers_to(4, LEAST_TEXTS)
    cut = [replace(each, text=None) if each.sample == 3 else each for each in replies]
    asked = request_grid(
        prompts=tuple(Prompt(f"Prompt {n}") for n in range(4)), grid=(0.0,), samples=LEAST_TEXTS
    )
    level = assess(asked, cut, anchors_in_prompts, "d", instruments).levels[0]
    score = level.side.score
    assert score.by_prompt
    assert (level.cut, score.texts, score.short) == (4, 4 * (LEAST_TEXTS - 1), 0)
    assert score.sds.value > 50


@pytest.mark.parametrize("samples", [2, LEAST_TEXTS])
def test_prompts_that_differ_in_their_system_prompt_are_different_prompts(
    anchors, instruments, samples
):
    """Renaming the users' prompts apart changes no number."""
    personas = [f"You are writer {n}." for n in range(4)]
    found = []
    for prompts in (
        tuple(Prompt("Go on.", persona) for persona in personas),
        tuple(Prompt(f"Go on {n}.", persona) for n, persona in enumerate(personas)),
    ):
        asked = request_grid(prompts=prompts, grid=(0.0,), samples=samples)
        level = assess(asked, answers_to(4, samples), anchors, "d", instruments).levels[0]
        measures = {name: replace(each, parts="") for name, each in level.side.measures.items()}
        found.append((level.side.score, measures))
    assert found[0] == found[1]
    assert found[0][0].by_prompt == (samples == LEAST_TEXTS)


def test_a_cut_answer_is_shown_as_cut(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    replies = [replace(people[0], text=None), *people[1:]]
    result = assess(request_grid(grid=(0.0,)), replies, anchors, "d", instruments)
    assert result.levels[0].samples[0][1] is None
    assert "(ended in its thinking)" in as_html(result)


def test_thinking_before_an_answer_is_not_measured(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    thought = [replace(each, text=f"<think>{LONG}</think>\n\n{each.text}") for each in people]
    one = request_grid(grid=(0.0,))
    plain, other = (
        assess(one, replies, anchors, "d", instruments).levels[0] for replies in (people, thought)
    )
    assert other.side == plain.side
    assert f"{other.samples[0][1]}".strip() == plain.samples[0][1]


LONG = "the same thought, " * 80


def test_the_error_for_a_run_with_only_cut_answers_names_max_tokens(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    replies = [replace(each, text=None) for each in people]
    with pytest.raises(ValueError, match=r"0 of 24 \(24 ended in their thinking\).*max-tokens"):
        assess(request_grid(grid=(0.0,)), replies, anchors, "d", instruments)


def test_a_run_with_cut_answers_is_not_paired_with_a_complete_one(anchors, instruments, tmp_path):
    """Its resamples are of other texts: the intervals are combined as independent ones."""
    people = answers(human_like(TEXTS, seed=7), 0)
    whole = assess(larger_request_grid(), people, anchors, "d", instruments)
    cut = assess(larger_request_grid(), with_cut(people), anchors, "d", instruments)
    paths = [write(each, tmp_path / f"{i}.json") for i, each in enumerate((whole, whole, cut))]
    paired = compare(paths[0], paths[1]).levels[0][1][0].difference
    unpaired = compare(paths[0], paths[2]).levels[0][1][0].difference
    assert paired.high == paired.low == paired.value == unpaired.value == 0
    assert (unpaired.low or 0) < 0 < (unpaired.high or 0)


def test_the_score_does_not_depend_on_the_order_of_the_answers(anchors, instruments):
    people = human_like(TEXTS, seed=7)
    mixed = [people[i] for i in np.random.default_rng(0).permutation(TEXTS)]
    one = request_grid(grid=(0.0,))
    first, second = (
        assess(one, answers(texts, 0), anchors, "d", instruments).levels[0].side.score.sds.value
        for texts in (people, mixed)
    )
    assert first == pytest.approx(second, abs=1e-9)


@pytest.mark.long
def test_a_thousand_texts_of_five_hundred_words(tmp_path, record_values):
    """In a minute of CPU time and 2 GB; in separate processes."""
    for step in ("build", "measure"):
        code = f"from tests.unit.test_evaluation import {step}; {step}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    peak_bytes = json.loads((tmp_path / "result.json").read_text())["cost"]["peak_bytes"]
    seconds = float((tmp_path / "seconds").read_text())
    record_values(seconds=seconds, peak_gigabytes=peak_bytes / 1e9)
    assert seconds < 60
    assert peak_bytes < 2e9


def build(folder: str) -> None:
    samples = [Sample(text) for text in human_like(4400, 560)]
    reference.save(reference.build(samples, words=500), Path(folder) / "anchors")


def measure(folder: str) -> None:
    human = reference.load(Path(folder) / "anchors")
    with_ = Instruments(StyleSpace.fit(human.splits["reference"]), read_phrases(), None)
    prompts = tuple(Prompt(f"Prompt {number}") for number in range(1000))
    replies = answers(human_like(1000, 560, seed=1), 0)
    start = time.process_time()
    found = assess(request_grid(prompts=prompts, grid=(0.0,)), replies, human, "d", with_)
    (Path(folder) / "seconds").write_text(str(time.process_time() - start))
    assert found.compared == 1000
    (Path(folder) / "result.json").write_text(found.as_json())


# ── The command ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "human.jsonl"
    lines = [json.dumps({"text": text}) for text in human_like(160)]
    path.write_text("\n".join(lines))
    return path


def run(*words: str):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_anchors_are_built_and_inspected(corpus, tmp_path):
    built = run("anchors", "build", corpus, "--out", tmp_path / "anchors")
    assert built.exit_code == 0, built.output
    assert "Held-out human text scores" in built.output
    assert built.output.startswith("160 texts from 160 works.")
    assert run("anchors", "inspect", tmp_path / "anchors").output in built.output
    again = run("anchors", "build", corpus, "--out", tmp_path / "anchors")
    assert again.exit_code != 0
    assert "anchors" in again.output


def test_the_word_run_may_be_left_out_and_errors_are_reported(corpus, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell me a story.\n")
    common = ("--prompts", prompts, "--out", tmp_path / "out")
    wrong = run("http://127.0.0.1:1", *common, "--anchors", tmp_path / "none")
    assert wrong.exit_code == 2
    assert "anchors.json" in wrong.output
    run("anchors", "build", corpus, "--out", tmp_path / "anchors")
    common = (*common, "--anchors", tmp_path / "anchors")
    unreachable = run("run", "http://127.0.0.1:1", *common)
    assert unreachable.exit_code == 1
    assert "is the server running" in unreachable.output
    assert run("http://127.0.0.1:1", *common, "--grid", "0,two").exit_code == 2
    assert run("http://127.0.0.1:1", *common, "--body", "[]").exit_code == 2
    few = run("http://127.0.0.1:1", *common, "--samples", "2")
    assert "accepted: 8" in few.output
    assert "anchors" in run("--help").output


def test_an_unknown_model_is_refused_before_a_server_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("dftserve.evaluate.run.running", None)
    job = SimpleNamespace(key_variable=None, is_url=False, model="nosuch", out=tmp_path / "out")
    with pytest.raises(ValueError, match="there is no such folder here"), server(job, print):
        pass
    assert not job.out.exists()
