"""`dftserve target`: building a store from texts, inspecting it, and what is refused."""

import contextlib
import errno
import json
import os
import queue
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dftserve.cli import main
from dftserve.corpus.prepare import GIVEN_AGAIN
from dftserve.targets import on_processes, progress, report, run, signals, store
from dftserve.targets import recipe as recipes
from dftserve.targets.document import Document
from dftserve.targets.encode_corpus import windows
from dftserve.targets.estimate import estimate_of
from dftserve.targets.references import References
from dftserve.targets.run import Job, read_documents
from dftserve.targets.store import TargetStore
from tests.permissions import shut

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
WORDS = [
    *("the", "a", "river", "stone", "quiet", "old", "lantern", "in", "under", "garden", "winter"),
    *("letter", "captain", "of", "and"),
]
MARKUP = "<script>alert(1)</script> & \x1b[31mred\x07"


def prose(words: int, seed: int) -> str:
    chosen = random.Random(seed)
    return "\n\n".join(
        " ".join(chosen.choices(WORDS, k=min(40, words - start))) + "."
        for start in range(0, words, 40)
    )


def make_tokenizer(folder: Path, *, size: int = 300, template: str | None = TEMPLATE) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([prose(500, 0)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("model"))


def save_novels(folder: Path) -> Path:
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(prose(200, i))
    return folder


@pytest.fixture
def novels(tmp_path) -> Path:
    folder = save_novels(tmp_path / "novels")
    (folder / "99.txt").write_text("short")
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_TOKENS", 1500)


def target(*arguments):
    return CliRunner().invoke(main, ["target", *map(str, arguments)])


def build(corpus, model, out, *more, recipe="creative"):
    return target("build", corpus, "--model", model, "--recipe", recipe, "--out", out, *more)


def refused(result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert [part for part in parts if part not in lines[0]] == []


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Build, inspect, verify


def test_build_verify_and_inspect(tmp_path, novels, model):
    out = tmp_path / "out"
    result = build(novels, model, out, "--heldout", "0.2")
    assert result.exit_code == 0, result.output
    assert "13 texts read, 12 kept" in result.output
    assert "dropped, too short: 1 (99.txt)" in result.output

    opened = TargetStore(out)
    corpus = opened.manifest.plan.corpus
    assert corpus["dropped"] == {"too short": {"count": 1, "examples": ["99.txt"]}}
    assert corpus["documents"] == {"train": len(opened), "heldout": opened.count("heldout")}
    assert str(tmp_path) not in (out / "manifest.json").read_text()
    document, targets = opened["train", 0]
    assert len(targets) == len(document.positions_T) > 200
    np.testing.assert_allclose(
        np.exp(targets.top_logprobs_TK).sum(1) + np.exp(targets.tail_logprob_T), 1, atol=2e-3
    )

    assert target("verify", out).exit_code == 0
    shown = target("inspect", out, "--model", model).output
    assert "top 6, 6 draws, sampled tail, seed 0" in shown
    assert "entropy of the training targets, nats" in shown
    inspected = json.loads(target("inspect", out, "--json").output)
    train = inspected["splits"]["train"]
    assert train["trained"] == sum(train["entropy_histogram"])
    assert 0 < train["entropy_nats"] < 8
    assert inspected["bytes_a_token"] <= 100  # 52, and the shards' headers, for few tokens.
    assert inspected["examples"][0]["positions"][0]["token"].startswith("#")


def test_the_html_page_has_no_scripts_and_no_external_resources(tmp_path, novels, model):
    for path in novels.iterdir():
        path.write_text(f"{MARKUP} {path.read_text()} ")
    out, page = tmp_path / "out", tmp_path / "page.html"
    assert build(novels, model, out).exit_code == 0
    result = target("inspect", out, "--model", model, "--html", page)
    assert result.exit_code == 0
    assert "\x1b[31m" not in result.output

    tags = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    content = page.read_text(encoding="utf-8")
    Tags().feed(content)
    assert {tag for tag, _ in tags} >= {"table", "svg", "style"}
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert not any({"src", "href", "onload"} & set(attrs) for _, attrs in tags)


def test_markup_and_control_characters_are_escaped_in_reports():
    statistics = report.SplitStatistics(1, 1, 1, 0.5, 0.1, 0.2, 0.0, (1, 0))
    position = report.Position(MARKUP, 0.5, ((MARKUP, 0.5),), 0.7)
    plan = {"k": 6, "draws": 6, "tail": "sampled", "seed": 0, "name": MARKUP}
    summary = report.Summary(
        MARKUP, plan, 52.0, {"train": statistics}, (report.Example(MARKUP, (position,)),)
    )
    assert "<script>" not in report.as_html(summary)
    assert "\x1b" not in report.as_text(summary).replace(MARKUP, "", 1)


def test_conversations_are_built_and_need_a_chat_template(tmp_path, model):
    lines = [
        {"prompt": f"question {i}?", "response": prose(20, 10 * i + j)}
        for i in range(8)
        for j in range(3)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = build(path, model, tmp_path / "out", "--heldout", "0.3", recipe="conversation")
    assert result.exit_code == 0, result.output
    opened = TargetStore(tmp_path / "out")
    plan = opened.manifest.plan
    assert plan.template is not None
    assert plan.source["kind"] == "mix"
    assert (len(opened) + opened.count("heldout")) == 24
    assert opened["train", 0][0].prompt

    bare = make_tokenizer(tmp_path / "bare", template=None)
    result = build(path, bare, tmp_path / "other", recipe="conversation")
    refused(result, "chat.jsonl:", "has no chat template")
    assert not (tmp_path / "other").exists()


def documents_of(job):
    recipe = recipes.load(job.recipe, job.values)
    return read_documents(job, recipe, lambda line: None, written_at=None)


def test_references_count_repeated_answers(tmp_path, model):
    """Answers that differ only in case count separately; without references, they are dropped."""
    answers = ["Yes, sure."] * 9 + ["No, never."] + ["yes, sure"] * 2
    path = tmp_path / "chat.jsonl"
    rows = [{"prompt": "Is it so?", "response": each} for each in answers]
    path.write_text("\n".join(map(json.dumps, rows)))
    job = Job(
        corpus=path, model=model, recipe="conversation", out=tmp_path / "out", heldout=0, seed=0
    )
    material = documents_of(job)
    documents = material.documents["train"]
    vocabulary = len(material.tokenizer)
    source = References(documents, vocabulary=vocabulary)
    first_V = source.read(documents[:1])[0](0, 1)[0].exp()
    shares = {
        material.tokenizer.decode(int(token)): float(first_V[token]) for token in first_V.nonzero()
    }
    assert shares == pytest.approx({"Y": 9 / 12, "N": 1 / 12, "y": 2 / 12}, abs=1e-6)
    assert material.corpus["noted"][GIVEN_AGAIN]["count"] == 9
    assert material.corpus["dropped"] == {}
    without = tmp_path / "ngram.yaml"
    without.write_text("corpus: {min_words: 3}\nsource: {ngram: {}}\n")
    material = documents_of(replace(job, recipe=str(without)))
    assert len(material.documents["train"]) == 2


def test_a_dropped_text_is_not_counted_as_joined(tmp_path, model):
    """Six texts with wrapped lines, two of which spell a special token."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        wrapped = textwrap.fill(prose(100, i).replace("\n", " "), 60)
        (folder / f"{i}.txt").write_text(f"{wrapped} </s>" if i < 2 else wrapped)
    arguments = ("--heldout", 0, "--set", "corpus.special_tokens=drop")
    result = build(folder, model, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    corpus = TargetStore(tmp_path / "out").manifest.plan.corpus
    assert (corpus["read"], corpus["kept"], corpus["joined"]) == (6, 4, 4)


def test_read_kept_and_dropped_counts_add_up(tmp_path, model):
    """Texts are also dropped after the filters: 1 is too short, and 10 have tool calls that the
    template cannot render. Each of 4 long texts becomes several documents."""
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    records = [{"text": "short"}, *({"text": prose(2500, 100 + i)} for i in range(4))]
    for i in range(30):
        answer = {"role": "assistant", "content": prose(30, i)}
        more = {"tool_calls": calls} if i < 10 else {}
        turns = [{"role": "user", "content": f"question {i}?"}, {**answer, **more}]
        records.append({"messages": turns})
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    result = build(path, model, tmp_path / "out", "--set", "corpus.min_words=5")
    assert result.exit_code == 0, result.output
    corpus = TargetStore(tmp_path / "out").manifest.plan.corpus
    dropped = sum(each["count"] for each in corpus["dropped"].values())
    assert (corpus["read"], corpus["kept"], dropped) == (35, 24, 11)
    documents = sum(corpus["documents"].values())
    assert "35 texts read, 24 kept" in result.output
    assert f"  24 texts in {documents} documents: longer ones are cut" in result.output


def test_a_build_whose_held_out_texts_are_all_left_out_is_refused(tmp_path, novels, model):
    """The text is held out by name, and is then longer than accepted."""
    given = tmp_path / "given.jsonl"
    given.write_text(json.dumps({"prompt": "question?", "response": prose(200, 50)}))
    arguments = ("--heldout-from", given, "--max-tokens", 64)
    result = build(novels, model, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert "Error: nothing is left of what is held out; hold out other texts" in result.output
    assert "longer than max_tokens: 1 (held out: given.jsonl:1)" in result.output
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_text_need_not_be_utf_8(tmp_path, novels, model):
    (novels / os.fsdecode(b"caf\xe9.txt")).write_text("short")
    (novels / os.fsdecode(b"d\xe9j\xe0.txt")).write_text(prose(200, 50))
    result = build(novels, model, tmp_path / "out")
    assert result.exit_code == 0, result.output
    plan = TargetStore(tmp_path / "out").manifest.plan
    assert plan.corpus["dropped"]["too short"]["examples"] == ["99.txt", "caf\\xe9.txt"]


def test_max_tokens_cuts_documents_and_keeps_every_trained_token(tmp_path, novels, model):
    assert build(novels, model, tmp_path / "a", "--heldout", "0").exit_code == 0
    assert build(novels, model, tmp_path / "b", "--heldout", "0", "--max-tokens", 64).exit_code == 0
    whole, cut = TargetStore(tmp_path / "a"), TargetStore(tmp_path / "b")
    assert max(cut.lengths("train")) == 64
    trained = [sum(shard.trained for shard in each.manifest.shards) for each in (whole, cut)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("size", [2, 3, 7, 8, 100])
def test_windows_train_every_token_once(size):
    tokens_N = np.arange(50, dtype=np.int32)
    document = Document(tokens_N, tokens_N % 3 > 0)
    parts = list(windows(document, size))
    assert max(len(part.tokens_N) for part in parts) <= size
    labels = np.concatenate([part.labels_T for part in parts])
    np.testing.assert_array_equal(labels, document.labels_T)


def test_a_document_stores_only_its_tokens_and_marks():
    """5 bytes a token, also after its properties were read: the whole corpus is held in memory."""
    document = Document(np.arange(1000, dtype=np.int32), np.arange(1000) > 3)
    assert (document.trained, len(document.positions_T), len(document.labels_T)) == (996,) * 3
    assert document.prompt == (0, 1, 2, 3)
    arrays = [each for each in vars(document).values() if isinstance(each, np.ndarray)]
    assert sum(each.nbytes for each in arrays) == 5 * 1000


def test_only_the_last_piece_of_a_cut_text_ends_with_the_end_token(tmp_path, novels, model):
    (novels / "00.txt").write_text(prose(2500, 77))
    assert build(novels, model, tmp_path / "out").exit_code == 0
    opened = TargetStore(tmp_path / "out")
    ends = [
        int(opened[split, i][0].tokens_N[-1])
        for split in store.SPLITS
        for i in range(opened.count(split))
    ]
    assert len(ends) == 14
    assert ends.count(1) == 12


# Resuming


def test_repeating_a_finished_build_changes_nothing(tmp_path, novels, model):
    out = tmp_path / "out"
    assert build(novels, model, out).exit_code == 0
    before = bytes_of(out)
    again = build(novels, model, out)
    assert again.exit_code == 0
    assert "is complete already" in again.output
    assert bytes_of(out) == before


def test_the_store_does_not_depend_on_the_paths_of_corpus_and_output(tmp_path, novels, model):
    assert build(novels, model, tmp_path / "a").exit_code == 0
    novels.rename(tmp_path / "moved")
    assert build(tmp_path / "moved", model, tmp_path / "b").exit_code == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("command", [["build"], ["students", "--folds", "3"]])
@pytest.mark.parametrize(
    ("where", "message"), [("link", "Not a directory"), ("shut/new/out", "Permission denied")]
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_corpus_is_read(
    tmp_path, novels, model, monkeypatch, command, where, message
):
    """A calibrated source is fitted, for hours with a large model, before the store is begun."""
    (tmp_path / "shut").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shut(monkeypatch, name="shut")
    given = ["--model", model, "--recipe", "creative", "--out", tmp_path / where]
    result = target(*command, novels, *given)
    assert result.exit_code == 1
    assert f"{tmp_path / where} cannot be" in result.output
    assert message in result.output
    assert "texts read" not in result.output


def test_a_finished_store_that_is_read_only_is_complete(tmp_path, novels, model, monkeypatch):
    assert build(novels, model, tmp_path / "out").exit_code == 0
    shut(monkeypatch, number=errno.EROFS)
    assert "is complete already" in build(novels, model, tmp_path / "out").output


def test_an_interrupted_build_resumes(tmp_path, novels, model, small_shards, monkeypatch):
    assert build(novels, model, tmp_path / "whole").exit_code == 0
    out, real = tmp_path / "out", store.build

    def interrupted(*given, **named):
        for step, tokens in enumerate(real(*given, **named)):
            if step == stop_after:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(store, "build", interrupted)
    for stop_after, message in ((0, "Stopped before the first shard"), (1, "Stopped; 1 shard in")):
        result = build(novels, model, out)
        assert result.exit_code == 130
        assert message in result.output
        assert len(list(out.glob("*.safetensors"))) == stop_after
        assert "Aborted" not in result.output
    refused(target("verify", out), "is unfinished; run its build again")
    monkeypatch.setattr(store, "build", real)
    assert build(novels, model, out).exit_code == 0
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_progress_is_logged(tmp_path, novels, model, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    result = build(novels, model, tmp_path / "out")
    assert "  13 texts read, " in result.output
    total = sum(TargetStore(tmp_path / "out").manifest.tokens(split) for split in store.SPLITS)
    assert f"  {total:,} of {total:,} tokens (100%), " in result.output


def test_a_progress_line_has_the_count_the_rate_and_the_time_left():
    lines: list[str] = []
    times = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    counter = progress.Progress("tokens", lines.append, total=10_000, clock=lambda: next(times))
    for count in (1000, 1000, 50, 150):
        counter.add(count)
    assert lines == [
        "  2,000 of 10,000 tokens (20%), 100 a second, about 80 s left",
        "  2,200 of 10,000 tokens (22%), 10 a second, about 13 min left",
    ]


def test_a_build_by_two_processes_resumes_after_sigint(tmp_path, novels, model):
    """The signal may arrive after the build has finished."""
    assert build(novels, model, tmp_path / "one").exit_code == 0
    out = tmp_path / "two"
    flags = ["--model", model, "--recipe", "creative", "--out", str(out)]
    command = [sys.executable, "-m", "dftserve.cli", "target", "build", str(novels), *flags]
    process = subprocess.Popen(
        [*command, "--processes", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not out.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    # A signal after the build may hit Python during its exit, which then prints a traceback.
    assert "Traceback" not in output or (out / "manifest.json").exists()
    assert not list(out.glob("*.partial"))
    assert build(novels, model, out, "--processes", 2).exit_code == 0
    assert bytes_of(out) == bytes_of(tmp_path / "one")


@dataclass
class _Worker:
    """A process of a build that has sent all of its results but has not ended yet."""

    results: queue.SimpleQueue
    pid: int | None = None
    is_terminated: bool = False

    def start(self) -> None:
        self.pid = 1
        self.results.put(None)

    def is_alive(self) -> bool:
        return True

    def terminate(self) -> None:
        self.is_terminated = True

    def join(self) -> None:
        pass


@pytest.fixture
def interruptible():
    """SIGINT and SIGTERM raise, also where pytest runs in a shell's background, which ignores
    SIGINT."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    terminate = signal.signal(signal.SIGTERM, signals.exit_once)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_while_the_processes_start_takes_effect_afterwards(monkeypatch, number, raised):
    """Even if another thread receives it. A process whose start is interrupted prints a
    traceback."""
    is_over = threading.Event()
    threading.Thread(target=is_over.wait, daemon=True).start()
    workers = [_Worker(queue.SimpleQueue()) for _ in range(2)]
    start = _Worker.start
    monkeypatch.setattr(_Worker, "start", lambda self: (os.kill(os.getpid(), number), start(self)))
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        on_processes._start(workers)
    is_over.set()
    assert all(worker.pid for worker in workers)
    assert signal.getsignal(signal.SIGINT) is before[0]
    # The first SIGTERM makes the process ignore further ones.
    assert signal.getsignal(signal.SIGTERM) in (before[1], signal.SIG_IGN)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.usefixtures("interruptible")
def test_a_signal_while_handlers_are_restored_leaves_none_deferred(monkeypatch):
    """It raises from the handler of SIGINT, which is restored before that of SIGTERM."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    replace = signal.signal

    def interrupted(number, handler):
        found = replace(number, handler)
        if handler is before[0]:
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt), signals.deferred():
        monkeypatch.setattr(signals.signal, "signal", interrupted)
    monkeypatch.undo()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_processes_can_be_started_by_another_thread():
    workers = [_Worker(queue.SimpleQueue()) for _ in range(2)]
    with ThreadPoolExecutor() as threads:
        threads.submit(on_processes._start, workers).result()
    assert all(worker.pid for worker in workers)


def test_processes_that_have_built_all_end_by_themselves(monkeypatch):
    """One that is ending would print a traceback if it were terminated."""
    results = queue.SimpleQueue()
    workers = [_Worker(results), _Worker(results)]
    made = iter(workers)
    context = SimpleNamespace(Queue=lambda: results, Process=lambda **_: next(made))
    monkeypatch.setattr(on_processes.multiprocessing, "get_context", lambda _: context)
    nothing = cast(Any, None)
    assert list(on_processes.build(nothing, nothing, {}, nothing, 2)) == []
    assert not any(worker.is_terminated for worker in workers)


def processes_of(parent: int) -> list[psutil.Process]:
    """The workers of a build."""
    found = []
    for each in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # Its process may have ended meanwhile.
            if "spawn_main" in " ".join(each.cmdline()):
                found.append(each)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_stopped_build_end(tmp_path, novels, model, number):
    """Even if it could not end them; the same command continues."""
    out = tmp_path / "out"
    flags = ["--model", model, "--recipe", "creative", "--out", str(out), "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dftserve.cli", "target", "build", str(novels), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(workers := processes_of(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate()[1]
    psutil.wait_procs(workers)
    assert not list(out.glob("*.safetensors*"))
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "the same command starts again" in output
        assert "Traceback" not in output
    assert build(novels, model, out).exit_code == 0
    assert not (out / store.LOCK).exists()


def test_a_second_build_in_a_folder_is_refused_while_the_first_runs(
    tmp_path, novels, model, monkeypatch
):
    out, work = tmp_path / "out", run._work

    def with_another(job, prepared, say):
        monkeypatch.setattr(run, "_prepared", lambda *_: pytest.fail("the corpus is read"))
        refused(build(novels, model, out), "another build writes to it")
        work(job, prepared, say)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_work", with_another)
        assert build(novels, model, out).exit_code == 0
    monkeypatch.undo()
    assert "is complete already" in build(novels, model, out).output


# Refusals


def test_invalid_build_arguments_are_refused(tmp_path, novels, model):
    out, empty, one = tmp_path / "out", tmp_path / "empty", tmp_path / "one"
    empty.mkdir()
    one.mkdir()
    (one / "a.txt").write_text(prose(60, 1))
    refused(build(empty, model, out), "got no files with the suffix")
    refused(build(one, model, out), "is one text", "--heldout 0")
    refused(build(tmp_path / "none", model, out), "nothing is there")
    refused(build(novels, model, out, recipe="creatif"), "did you mean 'creative'")
    refused(build(novels, model, out, "--set", "order"), "got 'order'; accepted: KEY=VALUE")
    refused(build(novels, model, out, "--set", "oder=3"), "did you mean 'order'")
    refused(build(novels, model, out, "--set", "order=0"), "order")
    refused(build(novels, str(empty), out), "no tokenizer that can be loaded")
    refused(build(novels, model, out, "--processes", 0), "processes: got 0")
    refused(build(novels, model, out, "--max-tokens", 1), "max_tokens: got 1")
    refused(build(novels, model, out, "--heldout", 1), "heldout: got 1")
    assert not out.exists()


def test_the_corpus_folder_is_refused_as_the_output(novels, model):
    refused(build(novels, model, novels), "--out", "the corpus itself")
    assert {path.suffix for path in novels.iterdir()} == {".txt"}


def test_another_tokenizer_is_refused(tmp_path, novels, model):
    out, other = tmp_path / "out", make_tokenizer(tmp_path / "other", size=310)
    assert build(novels, model, out).exit_code == 0
    before = bytes_of(out)
    refused(build(novels, other, out), "another plan: tokenizer is")
    refused(target("inspect", out, "--model", other), "another tokenizer")
    (novels / "extra.txt").write_text(prose(100, 50))
    refused(build(novels, model, out), "another plan: ")
    assert bytes_of(out) == before


def test_an_unwritable_output_path_is_refused(tmp_path, novels, model):
    """A file is in the place of the folder: permissions do not stop root."""
    (tmp_path / "file").write_text("mine")
    result = build(novels, model, tmp_path / "file" / "out")
    assert (result.exit_code, "cannot be made: Not a directory" in result.output) == (1, True)
    assert build(novels, model, tmp_path / "out").exit_code == 0
    page = tmp_path / "file" / "page.html"
    refused(target("inspect", tmp_path / "out", "--html", page), "cannot be made")


def test_a_full_disk_leaves_no_partial_shard(tmp_path, novels, model, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "_write_shard", full)
        refused(build(novels, model, tmp_path / "out"), "No space left on device")
    assert list(bytes_of(tmp_path / "out")) == ["lock", "plan.json"]
    assert build(novels, model, tmp_path / "out").exit_code == 0


def test_a_changed_or_missing_shard_is_found(tmp_path, novels, model):
    out = tmp_path / "out"
    assert build(novels, model, out).exit_code == 0
    path = out / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(target("verify", out), "train-00000.safetensors", "not the file that the build wrote")
    refused(build(novels, model, out), "train-00000.safetensors")  # Nor is a new checksum written.
    path.unlink()
    refused(target("verify", out), "train-00000.safetensors is missing")
    refused(target("inspect", out), "train-00000.safetensors")
    refused(target("verify", tmp_path), "has no manifest.json")


def test_a_dead_worker_process_is_reported(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=os._exit, args=(9,))
    worker.start()
    with pytest.raises(RuntimeError, match="ended with exit code 9"):
        list(on_processes._finished_tokens(results, [worker]))
    worker.join()


def test_help_needs_no_torch():
    code = (
        "import sys; from dftserve.cli import main\n"
        "try: main(['target', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers', 'datasets', 'yaml') if n in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.endswith("[]\n")
    assert "--max-tokens" in output


# Cost estimates


def test_a_plan_is_measured_and_writes_nothing(tmp_path, novels, model):
    out = tmp_path / "out"
    result = build(novels, model, out, "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert planned["documents"] == 12
    assert planned["tokens"] >= planned["measured_tokens"] > 200
    expected = planned["tokens"] / planned["tokens_per_second"]
    assert planned["seconds"] == pytest.approx(expected)
    shown = build(novels, model, out, "--plan")
    assert "a second and process, measured on" in shown.stdout
    assert "Measuring the first batches" in shown.stderr
    assert not out.exists()


def test_a_plan_measures_for_ten_seconds_and_divides_by_the_processes():
    tokens_N = np.arange(4096, dtype=np.int32)
    documents = [Document(tokens_N, tokens_N > 0) for _ in range(40)]
    ticks = iter(np.arange(0, 1000, 4.0))
    source = SimpleNamespace(read=0)

    def targets(some, **_):
        source.read += len(some)

    source.targets = targets
    plan = SimpleNamespace(k=1, draws=1, source={})
    estimate = estimate_of(source, plan, {"train": documents}, 4, clock=lambda: next(ticks))
    # Batches of two: one to warm up, and three until more than ten seconds have passed.
    assert source.read == 2 + 6
    assert estimate.measured_tokens == 6 * 4096
    assert estimate.tokens_per_second == pytest.approx(6 * 4096 / 12)
    assert estimate.seconds == pytest.approx(40 * 4096 / estimate.tokens_per_second / 4)


def test_processes_are_spread_over_the_gpus(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for rank in range(3):
        on_processes._take_device(rank)
    assert devices == [0, 1, 0]
