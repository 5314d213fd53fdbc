"""From texts to a profile, whose content follows from how the texts were generated."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dftserve import cli
from dftserve.evaluate.text.windows import Sample
from dftserve.fingerprints import tokenizer_fingerprint
from dftserve.styles import build as builds
from dftserve.styles import profile as profiles
from dftserve.styles.automaton import completions
from dftserve.styles.build import Job, build, on_shared_prompts
from dftserve.styles.report import Rate, as_html, as_json, as_text, figures, inspect
from tests.local_server import reply, serving

PLAIN = [f"{a}{b}o" for a in "bdfgklmnprst" for b in ("a", "e", "i", "u", "ou", "an")]


def text(rng, *inserted):
    words = rng.choices(PLAIN, k=40)
    for phrase in inserted:
        words.insert(rng.randrange(1, len(words)), phrase)
    return f"{' '.join(words)}."


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """For a model that writes one phrase in every third answer, and "blurry" instead of "pale"."""
    folder = tmp_path_factory.mktemp("style")
    rng = random.Random(1)
    model = [
        {
            "prompt": f"Ask {n % 8}.",
            "response": text(rng, *["a testament to"] * (n // 8 % 3 == 0), *["blurry"] * 2),
        }
        for n in range(96)
    ]
    human = [text(rng, "pale", "pale") for _ in range(192)]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in model))
    (folder / "human.jsonl").write_text("".join(f"{json.dumps({'text': t})}\n" for t in human))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*human, *(row["response"] for row in model)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / "model")
    return Job(
        corpus=folder / "human.jsonl",
        model=str(folder / "model"),
        answers=folder / "answers.jsonl",
        out=folder / "profile",
    )


@pytest.fixture(scope="module")
def stored(job):
    lines = []
    built = build(job, lines.append)
    assert lines == ["Comparing 96 answers with 192 texts by people…"]
    return built


def test_a_server_without_http_is_refused_before_anything_is_read(job):
    with pytest.raises(ValueError, match=r"got '127\.0\.0\.1:8000'; accepted: http://HOST:PORT"):
        replace(job, answers=None, server="127.0.0.1:8000", prompts=Path("prompts.txt"))


def test_a_profile_contains_the_phrase_the_words_and_the_model(job, stored):
    profile = profiles.read(job.out)
    tokenizer = builds.load_tokenizer(job.model)
    assert [phrase.text for phrase in profile.phrases] == ["a testament to"]
    phrase = profile.phrases[0]
    assert phrase.model_rate == pytest.approx(1000 * 32 / stored.counts["model"]["words"])
    assert phrase.human_rate == 0
    assert phrase.log_ratio > 2
    assert profile.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert (profile.name, profile.model) == ("profile", "model")
    assert stored.counts["recall"]["recall"] == 1
    tokens_of = {word: tokenizer(f" {word}")["input_ids"] for word in ("blurry", "pale")}
    assert profile.unigram_V[tokens_of["blurry"]].min() < -0.5
    assert profile.unigram_V[tokens_of["pale"]].max() > 0.5
    # The automaton accounts for the tokens of the phrase.
    assert profile.unigram_V[tokenizer(" testament")["input_ids"]].min() == 0


def test_factors_fall_along_the_phrase(job, stored):
    profile = stored.profile
    tokens = builds.load_tokenizer(job.model)(" a testament to")["input_ids"]
    state, factors = 0, []
    for token in tokens:
        state, factor = profile.step(state, token)
        factors.append(factor)
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(-profile.phrases[0].log_ratio, abs=1e-4)


def test_equal_texts_give_equal_files(job, stored, tmp_path):
    build(replace(job, out=tmp_path / "profile"), lambda line: None)
    for name in (profiles.MANIFEST, profiles.TENSORS):
        assert (tmp_path / "profile" / name).read_bytes() == (job.out / name).read_bytes()


def test_every_format_of_the_summary_shows_the_phrases(job, stored):
    summary = inspect(profiles.load(job.out))
    assert "a testament to" in as_text(summary)
    assert "It finds 100.0% of" in as_text(summary)
    assert json.loads(as_json(summary))["rows"][0]["human"]["value"] == 0
    assert '<td class="text">a testament to</td>' in as_html(summary)


def test_every_phrase_is_plotted_with_both_rates_and_rate_0_at_the_edge(job, stored):
    summary = inspect(profiles.load(job.out))
    (plot,) = figures(summary)
    points = [(p.x.low, p.x.value, p.x.high, p.y.value) for p in plot.series[0].points]
    rows = summary.rows
    assert points == [(r.human.low, r.human.value, r.human.high, r.model.value) for r in rows]
    assert plot.x.at(0.0) == 0
    assert plot.x.ticks[0].label == "0"
    assert 'id="phrase-rates-title"' in as_html(summary)


def test_an_interval_of_a_rate_has_its_nominal_coverage():
    """At least 95% for Poisson counts, less six standard errors over 2,000 draws."""
    counts = np.random.default_rng(0).poisson(4, 2000)
    rates = {count: Rate.of(count, 1000) for count in set(counts.tolist())}
    covered = np.mean([rates[n].low <= 4 <= rates[n].high for n in counts.tolist()])
    assert covered > 0.95 - 6 * (0.95 * 0.05 / 2000) ** 0.5
    assert Rate.of(0, 1000).low == 0


def test_both_sides_are_restricted_to_their_common_prompts():
    def of(*prompts):
        return [Sample("text", prompt) for prompt in prompts]

    model, human, is_shared = on_shared_prompts(of("a", "a", "b", "c"), of("b", "c", "d"))
    assert is_shared
    assert [s.prompt for s in model] == ["b", "c"]
    assert [s.prompt for s in human] == ["b", "c"]
    model, human, is_shared = on_shared_prompts(of("a", "b", "c"), of("c", "", "d"))
    assert (len(model), len(human), is_shared) == (3, 3, False)


def test_typesetting_of_long_works_is_no_choice_of_words(job, tmp_path):
    """The same author's text in long works and in answers gives no δ, since both are compared as
    they were written. Dashes have none even where the sides differ."""
    rng = random.Random(2)

    def written(sentences, dash):
        lines = []
        for n in range(sentences):
            a, b, c, d = rng.choices(PLAIN, k=4)
            lines.append(f"“{a} {b}’s {c}{dash}{d},” {a}…" + ("\n" if n % 3 else " "))
        return "".join(lines)

    def deltas(name, human_dash):
        answers = [{"prompt": f"Ask {n % 16}.", "response": written(40, "—")} for n in range(96)]
        works = [{"text": written(400, human_dash)} for _ in range(12)]
        for side, rows in (("answers", answers), ("works", works)):
            lines = "".join(f"{json.dumps(row)}\n" for row in rows)
            (tmp_path / f"{name}-{side}.jsonl").write_text(lines)
        of_both = replace(
            job,
            corpus=tmp_path / f"{name}-works.jsonl",
            answers=tmp_path / f"{name}-answers.jsonl",
            out=tmp_path / name,
        )
        profile = build(of_both, lambda line: None).profile
        return np.flatnonzero(profile.unigram_V), profile.bigram_token_M

    tokenizer = builds.load_tokenizer(job.model)
    pieces = builds.token_pieces(tokenizer)
    same, same_pairs = deltas("same", "—")
    assert (len(same), len(same_pairs)) == (0, 0)
    other, other_pairs = deltas("other", " — ")
    changed = [pieces[token] for token in {*other.tolist(), *other_pairs.tolist()}]
    assert changed, "the sides differ in their spaces"
    assert all(piece.isascii() for piece in changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("build human.jsonl --model model --out new", "got neither --answers nor --server"),
        ("build human.jsonl --model model --out new --answers none", "which does not exist"),
        ("build none --model model --out new --answers answers.jsonl", "nothing is there"),
        ("build empty.jsonl --model model --out new --answers answers.jsonl", "empty.jsonl"),
        ("build empty.txt --model model --out new --answers answers.jsonl", "empty.txt"),
        ("build empty --model model --out new --answers answers.jsonl", "empty"),
        ("build human.jsonl --model ./none --out new --answers answers.jsonl", "no such folder"),
        ("build human.jsonl --model model --out profile --answers answers.jsonl", "exists; choose"),
        ("build human.jsonl --model model --out .x --answers answers.jsonl", "name: got '.x'"),
        ("build human.jsonl --model model --out new --answers few.jsonl", "got 1; accepted: 32"),
        ("build human.jsonl --model model --out new --server http://x", "prompts: got none"),
        (
            "build human.jsonl --model model --out new --answers answers.jsonl --server http://x "
            "--prompts p.txt",
            "and a server; accepted: a file of answers without --server",
        ),
        (
            "build human.jsonl --model model --out new --answers answers.jsonl "
            "--false-discoveries 2",
            "false_discoveries: got 2.0; accepted: 0 to 1",
        ),
        ("inspect none", "give the --out of a `dftserve style build`"),
        ("fit ./none --profile profile --prompts p.txt --out fit", "there is no such folder"),
        ("fit model --profile none --prompts p.txt --out fit", "none has no profile.json"),
    ],
)
def test_unusable_arguments_are_refused_with_the_reason(
    job, stored, monkeypatch, arguments, message
):
    monkeypatch.chdir(job.out.parent)
    (job.out.parent / "empty").mkdir(exist_ok=True)
    for name in ("empty.jsonl", "empty.txt"):
        (job.out.parent / name).touch()
    (job.out.parent / "few.jsonl").write_text('{"prompt": "p", "response": "some words"}\n')
    result = CliRunner().invoke(cli.main, ["style", *arguments.split()])
    assert result.exit_code in (1, 2), result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (job.out.parent / "new").exists()


def test_the_automaton_finds_the_counted_occurrences(job, stored):
    """In the answers, it finds as many as the profile's model rate is computed from."""
    tokenizer = builds.load_tokenizer(job.model)
    texts = [sample.text for sample in builds.answers_of(job, print, lambda done, total: None)]
    patterns = builds.spellings.spell(tokenizer, ["a testament to"])
    automaton = builds.build_automaton(patterns, vocabulary=len(tokenizer))
    encoded = builds.spellings.encode(tokenizer, texts)
    found = sum(len(completions(automaton, each.tokens)) for each in encoded)
    assert found == stored.counts["phrases"][0]["model_count"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--strength 1.5", "strength: got 1.5; accepted: 0 to 1."),
        ("--max-kl -1", "max_kl: got -1.0; accepted: 0 to 10."),
        ("--max-kl nan", "max_kl: got nan"),
        ("--samples 31", "answers: got 31; accepted: 32 or more"),
        ("--phrases long.txt", "of 201 characters; accepted: at most 200"),
        ("--phrases deep.txt", "tokens; accepted: at most 256"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_request(
    job, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(job.out.parent)
    Path("prompts.txt").write_text("Ask.")
    Path("long.txt").write_text("so " * 66 + "far")
    Path("deep.txt").write_text("𒀀" * 100)  # Letters of four bytes, which are tokens of their own.
    requests = []

    def answer(request):
        requests.append(request.path)
        reply(request, 500, b"")

    with serving(answer) as url:
        words = f"build human.jsonl --model model --out {tmp_path / 'new'} --server {url}"
        words += f" --prompts prompts.txt --samples 32 {options}"
        result = CliRunner().invoke(cli.main, ["style", *words.split()])
    assert result.exit_code in (1, 2), result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_offsets_is_refused_before_the_first_request(job, monkeypatch):
    monkeypatch.setattr(builds, "load_tokenizer", lambda model: SimpleNamespace(is_fast=False))
    monkeypatch.setattr(builds, "answers_of", lambda *_: pytest.fail("answers were asked for"))
    with pytest.raises(ValueError, match="does not report the offsets"):
        build(replace(job, out=job.out.with_name("new")), lambda line: None)


def test_a_profile_that_no_engine_accepts_is_not_written(job, tmp_path, monkeypatch):
    def refuse(profile):
        raise ValueError("phrases: got one of more tokens")

    monkeypatch.setattr(builds, "check_depth", refuse)
    with pytest.raises(ValueError, match="of more tokens"):
        build(replace(job, out=tmp_path / "new"), lambda line: None)
    assert not (tmp_path / "new").exists()


def test_the_model_in_the_working_folder_has_the_folders_name(job, monkeypatch):
    monkeypatch.chdir(job.model)
    assert replace(job, model=".").model_name == "model"
    assert replace(job, model="org/name").model_name == "name"
    with pytest.raises(ValueError, match="model: got '/'"):
        replace(job, model="/")


def test_stored_answers_of_another_model_than_the_servers_are_refused(job, tmp_path):
    """A server's first model is used, and a folder keeps the answers of one model only."""
    served = ["a"]

    def answer(request):
        if request.command == "GET":
            content = {"data": [{"id": served[-1]}]}
        else:
            request.rfile.read(int(request.headers["Content-Length"]))
            message = {"role": "assistant", "content": "Said."}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            content = {"id": "1", "object": "chat.completion", "created": 1, "model": served[-1]}
            content |= {"choices": [choice]}
        reply(request, 200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    (tmp_path / "prompts.txt").write_text("Ask.")
    lines: list[str] = []
    with serving(answer) as url:
        server_job = replace(
            job, server=url, answers=tmp_path / "kept", prompts=tmp_path / "prompts.txt", samples=32
        )
        samples = builds.answers_of(server_job, lines.append, lambda done, total: None)
        assert [sample.text for sample in samples] == ["Said."] * 32
        assert builds.answers_of(server_job, lines.append, lambda done, total: None) == samples
        assert sum("is not known" in line for line in lines) == 1
        served.append("b")
        with pytest.raises(ValueError, match=r"model 'a' \(now 'b'\)"):
            builds.answers_of(server_job, lines.append, lambda done, total: None)
    assert builds.answers_of(server_job, lines.append, lambda done, total: None) == samples
    assert "Whether it still serves a is not known" in lines[-2]
