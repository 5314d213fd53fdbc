"""An evaluation from answers to report, and two of them as a pair."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
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
from dftserve.evaluate.metrics.intervals import Estimate
from dftserve.evaluate.metrics.slop import read_phrases
from dftserve.evaluate.metrics.suite import MEASURES, _clipped
from dftserve.evaluate.report.compare import compare
from dftserve.evaluate.report.figures import Accuracy, figures
from dftserve.evaluate.report.html import as_html, as_text
from dftserve.evaluate.run import Answer, Instruments, RequestGrid, StyleSpace, assess
from dftserve.evaluate.text.thinking import CUT_NOTE
from dftserve.evaluate.text.windows import Sample
from tests.texts import human_like

TEXTS = 24


@pytest.fixture(scope="module")
def anchors():
    return reference.build([Sample(text) for text in human_like(160)])


@pytest.fixture(scope="module")
def instruments(anchors):
    return Instruments(StyleSpace.fit(anchors.splits["reference"]), read_phrases(), None)


def asking(**changes) -> RequestGrid:
    prompts = tuple(Prompt(f"Prompt {number} <script>") for number in range(TEXTS))
    values = {"model": "a & b", "prompts": prompts, "grid": (0.0, 0.5), "samples": 1}
    return RequestGrid(**{**values, **changes})


def answers(texts: list[str], level: int, figures=None) -> list[Answer]:
    return [Answer(level, i, 0, text, "stop", 200 + i, figures) for i, text in enumerate(texts)]


FIGURES = {
    "mean_entropy_before": 1.0,
    "mean_entropy_after": 1.5,
    "mean_temperature": 1.2,
    "tokens_changed": 0.1,
}


@pytest.fixture(scope="module")
def result(anchors, instruments):
    """Level 0 says one thing over and over; level .5 writes like people."""
    people = human_like(TEXTS, seed=7)
    same = [people[0]] * (TEXTS // 2) + people[: TEXTS // 2]
    said = [*answers(same, 0), *answers(people, 1, FIGURES)]
    return assess(asking(), said, anchors, "digest", instruments)


def test_a_varied_level_is_told_from_a_monotonous_one(result):
    same, people = (level.side for level in result.levels)
    assert people.score.sds.value > 60 > 40 > same.score.sds.value
    assert people.score.sds.low > same.score.sds.high
    assert people.measures["self_bleu"].high < same.measures["self_bleu"].low
    assert people.measures["mmd_style_p"].value > 0.001


def test_every_number_has_an_interval_and_a_human_value_beside_it(result):
    for level in result.levels:
        assert set(level.side.measures) == set(result.human.measures)
        for name, value in level.side.measures.items():
            if name != "mmd_style_p":
                assert value.low <= value.value + 1e-9, name
                assert value.value <= value.high + 1e-9, name
    assert set(result.human.measures) <= set(MEASURES)


def test_no_interval_leaves_the_range_of_its_measure(result):
    """Half of a level is one text twelve times: leaving out a tenth moves its measures far."""
    for side in (result.human, *(level.side for level in result.levels)):
        for name, found in side.measures.items():
            least, most = MEASURES[name].least, MEASURES[name].most
            assert least <= found.value <= most, name
            if found.low is not None and found.high is not None:
                assert least <= found.low <= found.high <= most, name
    wide = _clipped(Estimate(0.95, 0.8, 1.1), MEASURES["c2st_style"])
    assert (wide.low, wide.high) == (0.8, 1.0)


def test_entropies_are_the_answers_own(result):
    off, on = (level.entropy for level in result.levels)
    assert off is None
    assert (on.before.value, on.after.value, on.temperature.value) == pytest.approx((1, 1.5, 1.2))
    assert on.histogram_before[4] == on.histogram_after[6] == TEXTS


def test_the_report_is_whole_and_harmless(result):
    html = as_html(result)
    assert "<script" not in html, "what a model or a user wrote is text"
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert not re.search(r'(src|href)="?http', html), "it needs nothing else"
    shown = result.levels[1].side.score.sds.render(1)
    assert shown in html
    assert shown in as_text(result)


# ── Plots ────────────────────────────────────────────────────────────────────────────────────────


def ends(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.low, estimate.value, estimate.high


def drawn_ends(span) -> tuple[float | None, ...]:
    return span.low, span.value, span.high


def test_every_level_is_in_every_plot_with_its_intervals_and_people_at_their_value(result):
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


def test_a_level_without_a_value_has_no_point_and_the_others_have_theirs(result):
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
    """What `evaluate accuracy` writes, of questions that were answered once."""
    tasks = [
        compare_accuracy(task, {level: answered(said) for level, said in levels.items()})
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
    ("grid", "temperature", "told"),
    [
        ([0.5, True, {"strength": 1}], 1.0, "got mmlu at the diversities 0, none of them"),
        ([0.0], 1.0, "got gsm8k at the diversities 1, none of them"),
        ([0.0, 1.0], 0.7, "at temperature 1, and this run is at 0.7"),
    ],
)
def test_accuracy_of_other_answers_is_refused(grid, temperature, told):
    of_task = Estimate(0.5, 0.4, 0.6)
    accuracy = Accuracy("m", 1.0, {"mmlu": {0.0: of_task}, "gsm8k": {1.0: of_task}})
    accuracy.check([0.0, 1.0, {"strength": 1}], 1.0)
    with pytest.raises(ValueError, match=told):
        accuracy.check(grid, temperature)


def test_a_file_that_is_no_report_of_accuracy_is_refused(tmp_path):
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


def test_a_run_against_itself_differs_by_nothing(result, tmp_path):
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


def test_pairs_are_narrower_than_strangers(anchors, instruments, tmp_path):
    """Two models with the same texts but for a few: the paired interval of the score is narrower
    than the interval of either."""
    people = human_like(TEXTS, seed=7)
    nearly = [*people[:-2], *human_like(2, seed=9)]
    one = asking(grid=(0.0,))
    paths = [
        write(assess(one, answers(texts, 0), anchors, "d", instruments), tmp_path / f"{i}.json")
        for i, texts in enumerate((people, nearly))
    ]
    row = compare(*paths).levels[0][1][0]
    assert row.difference.high - row.difference.low < row.a.high - row.a.low


def test_runs_that_left_out_other_prompts_are_no_pairs(result, tmp_path):
    """As where one of them has a text that was too short to be measured, or is of a version that
    did not say."""
    first = write(result, tmp_path / "a.json")
    other = json.loads(first.read_text())
    shown = {"same": compare(first, first)}
    for name, parts in (("other", "0" * 16), ("unsaid", "")):
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
    assert widths["other"].high == widths["unsaid"].high > 0


def test_one_prompt_alone_has_no_p(anchors, instruments):
    """Its answers are one draw of a prompt: there is nothing to permute."""
    people = human_like(TEXTS, seed=7)
    one = asking(prompts=(Prompt("Only one."),), grid=(0.0,), samples=TEXTS)
    said = [Answer(0, 0, number, text, "stop", 200, None) for number, text in enumerate(people)]
    measures = assess(one, said, anchors, "d", instruments).levels[0].side.measures
    assert {"mmd_style_p", "c2st_style"}.isdisjoint(measures)
    assert "mmd_style" in measures


def test_a_score_within_prompts_and_one_between_texts_are_no_pair(result, tmp_path):
    """So many answers of one run were cut that its prompts have too few to be compared within."""
    first = write(result, tmp_path / "a.json")
    other = json.loads(first.read_text())
    for level in other["levels"]:
        score = level["side"]["score"]
        score["by_prompt"] = not score["by_prompt"]
    (tmp_path / "b.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="within prompts"):
        compare(first, tmp_path / "b.json")


def test_a_report_says_where_diversities_are_not_compared_alike(result):
    low, high = result.levels
    score = replace(high.side.score, by_prompt=not high.side.score.by_prompt)
    mixed = replace(result, levels=(low, replace(high, side=replace(high.side, score=score))))
    assert "within prompts at some diversities only" in as_text(mixed)
    assert "at some diversities only" not in as_text(result)


def test_other_prompts_or_anchors_are_no_pair(result, anchors, instruments, tmp_path):
    people = human_like(TEXTS, seed=7)
    said = [*answers(people, 0), *answers(people, 1)]
    other = asking(prompts=tuple(Prompt(f"Other {number}") for number in range(TEXTS)))
    first = write(result, tmp_path / "a.json")
    second = write(assess(other, said, anchors, "digest", instruments), tmp_path / "b.json")
    with pytest.raises(ValueError, match="prompts"):
        compare(first, second)
    third = write(assess(asking(), said, anchors, "another", instruments), tmp_path / "c.json")
    with pytest.raises(ValueError, match="anchors"):
        compare(first, third)
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match=r"d\.json"):
        compare(first, tmp_path / "d.json")


def test_texts_that_are_too_short_are_said_to_be(anchors, instruments):
    short = [text[:200] for text in human_like(TEXTS, seed=7)]
    with pytest.raises(ValueError, match=r"0 of 24.*max-tokens"):
        assess(asking(grid=(0.0,)), answers(short, 0), anchors, "d", instruments)


THINKING = (None, "<think>He wants a story. Let me", "</think>", "<think>a</think>\n<think>b")
"""As servers without and with a parser of thinking end an answer whose tokens were used up."""


def with_cut(said: list[Answer]) -> list[Answer]:
    """The same answers, and others that ended in their thinking."""
    cut = [
        Answer(said[0].level, TEXTS + i, 0, text, "length", 1024, None)
        for i, text in enumerate(THINKING)
    ]
    return [*cut, *said]


def asking_more() -> RequestGrid:
    prompts = tuple(Prompt(f"Prompt {number}") for number in range(TEXTS + len(THINKING)))
    return asking(grid=(0.0,), prompts=prompts)


def test_answers_that_end_in_their_thinking_are_counted_and_in_no_measure(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    plain = assess(asking_more(), people, anchors, "d", instruments).levels[0]
    result = assess(asking_more(), with_cut(people), anchors, "d", instruments)
    level = result.levels[0]
    assert (level.cut, level.unfinished, plain.cut) == (len(THINKING), 0, 0)
    assert (level.side, level.tokens) == (plain.side, plain.tokens)
    assert level.side.score.short == 0, "they are no short texts either"
    assert json.loads(result.as_json())["levels"][0]["cut"] == len(THINKING)
    lines = as_text(result).splitlines()
    assert ["cut", "–", "4"] in [line.split() for line in lines]
    assert lines[-1] == CUT_NOTE
    assert CUT_NOTE in as_html(result)


def test_an_answer_that_was_cut_is_shown_as_one(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    said = [replace(people[0], text=None), *people[1:]]
    result = assess(asking(grid=(0.0,)), said, anchors, "d", instruments)
    assert result.levels[0].samples[0][1] is None
    assert "(ended in its thinking)" in as_html(result)


def test_thinking_before_an_answer_is_not_measured(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    thought = [replace(each, text=f"<think>{LONG}</think>\n\n{each.text}") for each in people]
    one = asking(grid=(0.0,))
    plain, other = (
        assess(one, said, anchors, "d", instruments).levels[0] for said in (people, thought)
    )
    assert other.side == plain.side
    assert f"{other.samples[0][1]}".strip() == plain.samples[0][1]


LONG = "the same thought, " * 80


def test_answers_that_are_all_cut_say_what_to_do(anchors, instruments):
    people = answers(human_like(TEXTS, seed=7), 0)
    said = [replace(each, text=None) for each in people]
    with pytest.raises(ValueError, match=r"0 of 24 \(24 ended in their thinking\).*max-tokens"):
        assess(asking(grid=(0.0,)), said, anchors, "d", instruments)


def test_runs_with_cut_answers_are_no_pairs_of_texts(anchors, instruments, tmp_path):
    """Their resamples are of other texts: the intervals are joined as strangers'."""
    people = answers(human_like(TEXTS, seed=7), 0)
    whole = assess(asking_more(), people, anchors, "d", instruments)
    cut = assess(asking_more(), with_cut(people), anchors, "d", instruments)
    paths = [write(each, tmp_path / f"{i}.json") for i, each in enumerate((whole, whole, cut))]
    paired = compare(paths[0], paths[1]).levels[0][1][0].difference
    strangers = compare(paths[0], paths[2]).levels[0][1][0].difference
    assert paired.high == paired.low == paired.value == strangers.value == 0
    assert (strangers.low or 0) < 0 < (strangers.high or 0)


def test_order_of_answers_within_a_level_is_theirs(anchors, instruments):
    """The score does not depend on the order of the texts."""
    people = human_like(TEXTS, seed=7)
    mixed = [people[i] for i in np.random.default_rng(0).permutation(TEXTS)]
    one = asking(grid=(0.0,))
    first, second = (
        assess(one, answers(texts, 0), anchors, "d", instruments).levels[0].side.score.sds.value
        for texts in (people, mixed)
    )
    assert first == pytest.approx(second, abs=1e-9)


@pytest.mark.long
def test_a_thousand_texts_of_five_hundred_words(tmp_path, figure):
    """In a minute and 2 GB, as the command prints them; in processes of their own, as it is."""
    for step in ("build", "measure"):
        code = f"from tests.unit.test_evaluation import {step}; {step}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
    cost = json.loads((tmp_path / "result.json").read_text())["cost"]
    figure(seconds=cost["seconds_scoring"], peak_gigabytes=cost["peak_bytes"] / 1e9)
    assert cost["seconds_scoring"] < 60
    assert cost["peak_bytes"] < 2e9


def build(place: str) -> None:
    samples = [Sample(text) for text in human_like(4400, 560)]
    reference.save(reference.build(samples, words=500), Path(place) / "anchors")


def measure(place: str) -> None:
    human = reference.load(Path(place) / "anchors")
    with_ = Instruments(StyleSpace.fit(human.splits["reference"]), read_phrases(), None)
    prompts = tuple(Prompt(f"Prompt {number}") for number in range(1000))
    said = answers(human_like(1000, 560, seed=1), 0)
    found = assess(asking(prompts=prompts, grid=(0.0,)), said, human, "d", with_)
    assert found.compared == 1000
    (Path(place) / "result.json").write_text(found.as_json())


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


def test_run_may_be_left_out_and_mistakes_are_named(corpus, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell me a story.\n")
    common = ("--prompts", prompts, "--out", tmp_path / "out")
    wrong = run("http://127.0.0.1:1", *common, "--anchors", tmp_path / "none")
    assert wrong.exit_code == 2
    assert "anchors.json" in wrong.output
    run("anchors", "build", corpus, "--out", tmp_path / "anchors")
    common = (*common, "--anchors", tmp_path / "anchors")
    gone = run("run", "http://127.0.0.1:1", *common)
    assert gone.exit_code == 1
    assert "is the server running" in gone.output
    assert run("http://127.0.0.1:1", *common, "--grid", "0,two").exit_code == 2
    assert run("http://127.0.0.1:1", *common, "--body", "[]").exit_code == 2
    few = run("http://127.0.0.1:1", *common, "--samples", "2")
    assert "accepted: 8" in few.output
    assert "anchors" in run("--help").output
