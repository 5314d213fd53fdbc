"""Fitting rounds of a style, with simulated writers whose rates are known."""

import contextlib
import json
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from dftserve.cli import main
from dftserve.evaluate import reference
from dftserve.evaluate.generate.grid import Answer
from dftserve.evaluate.generate.prompts import Prompt
from dftserve.evaluate.text.windows import Sample
from dftserve.styles import fit as fits
from dftserve.styles import profile as profiles
from dftserve.styles.figures import by_round
from dftserve.styles.fit import Job, StyledAnswer, effective_share, fit, rounds, updated
from dftserve.styles.profile import Phrase, ProfileError
from dftserve.styles.report import fit_figures, fit_html
from dftserve.styles.rounds import Fitted, read
from tests.local_server import in_force, reply, serving
from tests.styles import stored
from tests.texts import human_like
from tests.training import save_model

HUMAN = 1.0
"""Per 1,000 words, of each phrase."""
NATIVE = (10.0, 3.0)
"""The writer's rates without a style."""
PHRASES = ("velvet shadows", "a testament to")


def small(log_ratio_P=(0.0, 0.0)):
    made = stored(log_ratio_P=log_ratio_P)
    phrases = tuple(
        Phrase(text, x, native, HUMAN)
        for text, x, native in zip(PHRASES, log_ratio_P, NATIVE, strict=True)
    )
    return replace(made, profile=replace(made.profile, phrases=phrases))


class Writer:
    """Writes each phrase at its native rate times e^(−λ·`obeys`), with λ of the given profile."""

    def __init__(self, out, *, texts=300, obeys=(1.0, 1.0), kl=0.01):
        self.out, self.texts, self.obeys, self.kl = out, texts, obeys, kl
        self.names = []

    def __call__(self, name, number):
        self.names.append(name)
        given = profiles.read(self.out / "styles" / name)
        rng = np.random.default_rng(number)
        return [
            StyledAnswer(self.text(given, rng), f"prompt {n % 10}", n % 5 == 4, self.kl)
            for n in range(self.texts)
        ]

    def text(self, given, rng, words=200):
        parts = ["so"] * words
        for phrase, native, obeys in zip(given.phrases, NATIVE, self.obeys, strict=True):
            expected = words / 1000 * native * np.exp(-phrase.log_ratio * obeys)
            for index in rng.integers(0, words, rng.poisson(expected)):
                parts[index] += f", {phrase.text}."
        return " ".join(parts)


def test_rounds_bring_the_rates_to_those_of_people(tmp_path):
    writer = Writer(tmp_path)
    found = rounds(small(), writer, tmp_path, 5)
    first, last = found.rounds[0], found.rounds[-1]
    assert first.rate > 10
    assert first.above == 2
    assert last.rate == pytest.approx(2 * HUMAN, rel=0.35)
    assert last.held_out_rate == pytest.approx(2 * HUMAN, rel=0.5)
    assert last.human_rate == 2 * HUMAN
    assert last.mean_kl == pytest.approx(0.01)
    log_ratios = [phrase.log_ratio for phrase in found.stored.profile.phrases]
    assert log_ratios == pytest.approx([np.log(10), np.log(3)], abs=0.4)
    assert writer.names == [f"small-{n}" for n in range(1, len(found.rounds) + 1)]
    assert found.stored.counts["fit"]["rounds"][0]["number"] == 1


def test_a_phrase_with_half_the_effect_gets_twice_the_log_ratio(tmp_path):
    """The initial λ is wrong if the factors do not have their nominal effect; a fit corrects it
    whatever the reason."""
    found = rounds(small(np.log(NATIVE)), Writer(tmp_path, obeys=(0.5, 1.0)), tmp_path, 8)
    assert found.stored.profile.phrases[0].log_ratio == pytest.approx(2 * np.log(10), rel=0.25)


def test_a_phrase_that_people_use_more_often_gets_log_ratio_0(tmp_path):
    initial = small((1.0, 1.0))
    phrases = tuple(replace(phrase, human_rate=50.0) for phrase in initial.profile.phrases)
    initial = replace(initial, profile=replace(initial.profile, phrases=phrases))
    found = rounds(initial, Writer(tmp_path), tmp_path, 4)
    assert [phrase.log_ratio for phrase in found.stored.profile.phrases] == [0, 0]


def test_log_ratios_are_updated_by_the_rule_within_its_bounds():
    found = updated(np.array([1.0, 9.9, 0.1]), np.array([18, 998, 0]), np.array([8, 3, 98]))
    expected = [1 + 0.7 * np.log(20 / 10), 10, 0]
    assert found == pytest.approx(expected)


def test_held_out_prompts_do_not_influence_the_fit(tmp_path):
    def ask(name, number):
        return [
            StyledAnswer("so " * 200 + PHRASES[0], f"prompt {n}", n % 5 == 4, None)
            for n in range(50)
        ]

    def without(name, number):
        return [replace(s, text="so " * 200) if s.held_out else s for s in ask(name, number)]

    found = [
        rounds(small(), writer, tmp_path / str(n), 1) for n, writer in enumerate((ask, without))
    ]
    a, b = ([phrase.log_ratio for phrase in f.stored.profile.phrases] for f in found)
    assert a == b
    assert found[0].rounds[0].held_out_rate > found[1].rounds[0].held_out_rate == 0
    assert found[0].rounds[0].mean_kl is None


def test_the_effective_share_is_that_of_importance_sampling():
    counts_TP = np.array([[0.0, 1], [2, 0], [1, 1]])
    step_P = np.array([0.5, -0.25])
    weights = [np.exp(-(0.5 * a - 0.25 * b)) for a, b in counts_TP]
    expected = sum(weights) ** 2 / (3 * sum(w * w for w in weights))
    assert effective_share(counts_TP, step_P) == pytest.approx(expected)
    assert effective_share(counts_TP, 0 * step_P) == pytest.approx(1)


def test_a_step_that_leaves_too_few_effective_answers_is_not_taken(tmp_path):
    """All answers but one in fifty repeat the phrase."""

    def ask(name, number):
        text = "so " + f"{PHRASES[0]}. " * 60
        return [StyledAnswer(text if n else "so on", f"prompt {n}", False, None) for n in range(50)]

    found = rounds(small(), ask, tmp_path, 3)
    assert len(found.rounds) == 1
    assert "round 1's step would leave 2% of its answers effective" in found.ended
    assert [phrase.log_ratio for phrase in found.stored.profile.phrases] == [0, 0]


def test_a_profile_without_phrases_or_a_folder_of_another_fit_is_refused(tmp_path):
    initial = small()
    rounds(initial, Writer(tmp_path), tmp_path, 1)
    with pytest.raises(ValueError, match="small-1 is a profile of another fit"):
        rounds(small((2.0, 2.0)), Writer(tmp_path), tmp_path, 1)
    without_phrases = stored((), log_ratio_P=())
    with pytest.raises(ProfileError, match="has no phrases to fit"):
        rounds(without_phrases, Writer(tmp_path), tmp_path / "bare", 1)


def test_the_rounds_of_a_profile_are_read_as_they_were_written(tmp_path):
    found = rounds(small(), Writer(tmp_path), tmp_path, 2)
    profiles.write(tmp_path / "frozen", found.stored)
    counts = profiles.load(tmp_path / "frozen").counts
    assert read(counts, "profile.json") == found.fitted
    assert read({}, "profile.json") is None
    without = [{k: v for k, v in r.items() if "interval" not in k} for r in counts["fit"]["rounds"]]
    earlier = read({"fit": {"ended": "", "rounds": without}}, "profile.json")
    assert [one.interval for one in earlier.rounds] == [(), ()]
    for wrong in (3, {"ended": "", "rounds": [{}]}, {"ended": "", "rounds": 3}):
        with pytest.raises(ValueError, match=r"profile\.json: counts\.fit.*accepted"):
            read({"fit": wrong}, "profile.json")


def test_the_interval_of_a_round_contains_its_rate_and_narrows_with_more_texts(tmp_path):
    few, many = (
        rounds(small(), Writer(tmp_path / str(texts), texts=texts), tmp_path / str(texts), 1)
        for texts in (60, 600)
    )
    for found in (few, many):
        (one,) = found.rounds
        assert one.interval[0] < one.rate < one.interval[1]
        assert one.held_out_interval[0] < one.held_out_rate < one.held_out_interval[1]
    (low, high), (lower, higher) = many.rounds[0].interval, few.rounds[0].interval
    assert high - low < higher - lower


def test_every_round_and_phrase_is_plotted_with_its_interval_and_the_human_rate(tmp_path):
    found = rounds(small(), Writer(tmp_path), tmp_path, 3)
    by_round_plot, phrases = fit_figures(found.stored.profile, found.fitted, found.rates)
    fitted, held_out = by_round_plot.series
    for series, rate, interval in (
        (fitted, "rate", "interval"),
        (held_out, "held_out_rate", "held_out_interval"),
    ):
        assert [point.y.value for point in series.points] == [
            getattr(r, rate) for r in found.rounds
        ]
        spans = [(point.y.low, point.y.high) for point in series.points]
        assert spans == [getattr(one, interval) for one in found.rounds]
    (line,) = by_round_plot.references
    assert (line.axis, line.span.value) == ("y", 2 * HUMAN)
    before, after = phrases.series
    assert [point.y.value for point in before.points] == list(NATIVE)
    assert [point.y.value for point in after.points] == [rate.value for rate in found.rates]
    assert [point.label for point in after.points] == list(PHRASES)
    assert {point.x.value for point in (*before.points, *after.points)} == {HUMAN}
    assert sum(rate.value for rate in found.rates) == pytest.approx(found.rounds[-1].rate)


def test_unfitted_measures_are_plotted_in_the_rounds_that_have_them(tmp_path):
    found = rounds(small(), Writer(tmp_path), tmp_path, 2)
    first, last = found.rounds
    measured = (replace(first, unfitted={"sds": 40.0, "mmd_style": 0.5}), last)
    plots = {each.name: each for each in by_round(measured)}
    assert list(plots) == ["rounds", "rounds-sds", "rounds-mmd-style"]
    (point,) = plots["rounds-sds"].series[0].points
    assert (point.x.value, point.y.value) == (0, 40.0)
    assert [tick.label for tick in plots["rounds-sds"].x.ticks] == ["1", "2"]
    html = fit_html(found.stored.profile, Fitted("", measured), found.rates)
    assert html.count("<svg") == 4
    assert "0.500" in html


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 0}, "rounds: got 0; accepted: 1 to 20"),
        ({"server": "./nowhere"}, r"model: got './nowhere'; there is no such folder"),
        ({"server": "127.0.0.1:8000"}, "accepted: http://127.0.0.1:8000, or a model"),
        ({"serve_flags": ("--dtype", "x")}, "got the flags --dtype x and a URL"),
    ],
)
def test_an_invalid_job_is_refused(tmp_path, changed, message):
    values = {"server": "http://127.0.0.1:9", "profile": tmp_path, "prompts": tmp_path}
    with pytest.raises(ValueError, match=message):
        Job(**{**values, "out": tmp_path / "out", **changed})


@pytest.mark.parametrize("model", ["folder", "m.gguf", "with_gguf", "org/name"])
def test_every_kind_of_model_is_served(tmp_path, monkeypatch, model):
    """A folder, a GGUF file, which is resolved to its conversion, and a name on the hub."""
    served = []

    @contextlib.contextmanager
    def running(model, *flags, **options):
        served.append(model)
        raise RuntimeError("that is enough")
        yield

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    converted = {"m.gguf": str(tmp_path / "folder"), "with_gguf": str(tmp_path / "folder")}
    monkeypatch.setattr("dftserve.gguf.resolve", lambda model: converted.get(model, model))
    monkeypatch.setattr(fits, "running", running)
    profiles.write(tmp_path / "small", small())
    (tmp_path / "prompts.txt").write_text("Say 1.\n")
    options = ["--profile", "small", "--prompts", "prompts.txt", "--out", "fit"]
    result = CliRunner().invoke(main, ["style", "fit", model, *options])
    assert "that is enough" in result.output, result.output
    assert served == [converted.get(model, model)]


class FakeServer:
    """Has the given styles, and writes one phrase in each answer."""

    def __init__(self, *styles):
        self.styles, self.bodies, self.name = list(styles), [], "fake"

    def __call__(self, request):
        if request.command == "GET":
            known = {"styles": self.styles, "styles_refused": {"small-3": "a bad file"}}
            models = {"data": [{"id": self.name}]}
            content = known if request.path.endswith("capabilities") else models
        else:
            body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
            self.bodies.append(body)
            message = {"role": "assistant", "content": f"Well, {PHRASES[0]} {body['seed']}."}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            content = {"id": "1", "object": "chat.completion", "created": 1, "model": "fake"}
            content |= {"choices": [choice], **in_force(body, {"mean_kl": 0.02})}
        reply(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})


def test_too_few_answers_for_the_anchors_are_refused_before_the_first_round(tmp_path):
    """These compare eight answers to each prompt."""
    human = [Sample(text, f"asked {i % 16}") for i, text in enumerate(human_like(160))]
    reference.save(reference.build(human), tmp_path / "anchors")
    job = job_of(tmp_path, "http://127.0.0.1:1", anchors=tmp_path / "anchors", samples=4)
    with pytest.raises(ValueError, match="samples: got 4; accepted: 8 or more"):
        fit(job, lambda line: None)
    assert not job.out.exists()


def test_an_empty_answer_keeps_its_place_among_those_to_its_prompt(tmp_path, monkeypatch):
    """Of a prompt with fewer answers than were asked for, no score is possible."""
    asked = (Prompt("Go on.", "One."), Prompt("Go on.", "Two."))
    made = [
        Answer(0, place, n, None if n == 2 else "Said.", "stop", 2, None)
        for place in range(2)
        for n in range(8)
    ]
    monkeypatch.setattr(fits.grid, "count_answers", lambda folder: len(made))
    monkeypatch.setattr(fits.grid, "generate", lambda *_, **__: made)
    job = job_of(tmp_path, "http://127.0.0.1:1", served_as="fake", samples=8)
    found = fits._answers(job, asked, "small-1", 1, print, lambda *_: None)
    assert Counter(each.group for each in found) == {prompt.group: 8 for prompt in asked}
    assert [each.text for each in found].count("") == 2


def job_of(folder, server, **changed):
    """A fit of two rounds of the profile `small`, with five prompts; writes both."""
    profiles.write(folder / "small", small())
    (folder / "prompts.txt").write_text("".join(f"Say {n}.\n" for n in range(5)))
    job = Job(
        server=server,
        profile=folder / "small",
        prompts=folder / "prompts.txt",
        out=folder / "fit",
        rounds=2,
        samples=1,
    )
    return replace(job, **changed)


def test_a_fit_continues_when_the_server_has_the_next_profile(tmp_path):
    server = FakeServer("small-1")
    with serving(server) as url:
        job = job_of(tmp_path, url)
        with pytest.raises(
            ValueError, match=r"does not have the style 'small-2' \(it has: small-1"
        ):
            fit(job, lambda line: None)
        assert len(server.bodies) == 5
        assert {json.dumps(body["style"]) for body in server.bodies} == {
            '{"name": "small-1", "strength": 1}'
        }
        server.styles.append("small-2")
        found = fit(job, lambda line: None)
        assert len(server.bodies) == 10
    assert [one.mean_kl for one in found.rounds] == pytest.approx([0.02, 0.02])
    frozen = profiles.load(tmp_path / "fit" / "small")
    assert frozen.profile.phrases == found.stored.profile.phrases
    assert len(json.loads((tmp_path / "fit" / fits.RESULT).read_text())["rounds"]) == 2
    page = (tmp_path / "fit" / fits.REPORT).read_text()
    assert all(one.held_out_rate is not None for one in found.rounds)
    assert 'id="rounds-title"' in page
    assert 'id="phrase-rates-title"' in page
    with pytest.raises(FileExistsError, match="this fit is done"):
        fit(job, lambda line: None)


def test_a_round_with_answers_of_another_model_is_refused(tmp_path):
    server = FakeServer("small-1")
    with serving(server) as url:
        job = job_of(tmp_path, url)
        with pytest.raises(ValueError, match="does not have the style 'small-2'"):
            fit(job, lambda line: None)
        server.name = "another"
        with pytest.raises(ValueError, match=r"round-1: .*model 'fake' \(now 'another'\)"):
            fit(job, lambda line: None)


def test_a_round_with_answers_of_other_weights_is_refused(tmp_path, monkeypatch):
    """With a model folder, which is served again for each round."""

    @contextmanager
    def running(model, *flags, env, log):
        with serving(FakeServer("small-1")) as url:
            yield SimpleNamespace(url=f"{url}/v1")

    monkeypatch.setattr(fits, "running", running)
    job = job_of(tmp_path, str(save_model(tmp_path / "model")))
    with pytest.raises(ValueError, match="does not have the style 'small-2'"):
        fit(job, lambda line: None)
    save_model(tmp_path / "model", seed=1)
    with pytest.raises(ValueError, match=r"round-1: .*answers of other weights"):
        fit(job, lambda line: None)


def test_the_command_writes_the_plots_of_the_page_as_files(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'dftserve[plots]'")
    profiles.write(tmp_path / "small", small())
    (tmp_path / "prompts.txt").write_text("".join(f"Say {n}.\n" for n in range(5)))
    with serving(FakeServer("small-1")) as url:
        arguments = ["style", "fit", url, "--rounds", "1", "--samples", "1"]
        for name in ("prompts.txt", "small", "fit", "plots"):
            option = {"small": "profile", "fit": "out"}.get(name, name.partition(".")[0])
            arguments += [f"--{option}", str(tmp_path / name)]
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "plots").iterdir()}
    page = (tmp_path / "fit" / fits.REPORT).read_text()
    assert written == {f"{name}.png" for name in re.findall(r'id="([^"]*)-title"', page)}
    assert written == {"rounds.png", "phrase-rates.png"}


def test_a_style_that_the_server_refuses_is_reported_with_the_reason(tmp_path):
    with serving(FakeServer()) as url, pytest.raises(ValueError, match=r"'small-3': a bad file"):
        fits._check_has_style(fits.Server(f"{url}/v1", retries=0), "small-3", tmp_path)


def test_the_error_about_a_missing_server_names_the_written_profile(tmp_path):
    """The fit writes the profile of the first round, so no server can have it before."""
    with serving(FakeServer()) as url:
        pass
    stopped = fits.Server(f"{url}/v1", retries=0)
    with pytest.raises(
        fits.ServerError, match=r"unreachable.*'small-1' is written; restart the server"
    ):
        fits._check_has_style(stopped, "small-1", tmp_path)
