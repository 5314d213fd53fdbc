"""The audit log: what a line contains, what it must not contain, and failures to write it."""

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from dftserve_vllm import audit, engine, log, metrics, policy, request_context, request_params
from dftserve_vllm.request_context import RequestContext
from dftserve_vllm.response_middleware import ResponseMiddleware
from dftserve_vllm.styles import Styles
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from dftserve import spec
from dftserve.policy import VARIABLE, Audit

KEY = "a-secret-key"
PROMPT = "canary: once upon a time"
HEADERS = [(b"authorization", f"Bearer {KEY}".encode()), (b"x-request-id", b"r" * 500)]


@pytest.fixture
def set_audit(tmp_path, monkeypatch):
    """Sets a policy with an audit log, in the context of an HTTP request with a key."""
    model_config = SimpleNamespace(
        is_diffusion=False, override_generation_config={}, served_model_name="demo"
    )
    config = SimpleNamespace(
        model_config=model_config, speculative_config=None, use_v2_model_runner=True
    )
    monkeypatch.setattr(engine, "_config", config)
    monkeypatch.setattr(log, "_logged", set())

    def write(file):
        content = {"server": {"level": 0.5}, "on_excess": "clamp", "audit": {"file": str(file)}}
        (tmp_path / "policy.yaml").write_text(json.dumps(content))
        monkeypatch.setenv(VARIABLE, str(tmp_path / "policy.yaml"))
        policy.policy.cache_clear()
        audit.log.cache_clear()

    token = request_context.current.set(RequestContext(HEADERS))
    yield write
    request_context.current.reset(token)
    policy.policy.cache_clear()
    audit.log.cache_clear()


def sampling_params(prompts=1, **fields):
    """The sampling parameters of each prompt of a body."""
    request = CompletionRequest(model="demo", prompt=[PROMPT] * prompts, **fields)
    decide = request_params.honour(CompletionRequest.to_sampling_params)
    return [decide(request, 8, {}) for _ in range(prompts)]


def ask(**fields):
    """One request, to the end of its answer."""
    context = request_context.current.get()
    try:
        return sampling_params(**fields)[0]
    finally:
        context.status = 200
        audit.write_notes(context)


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def lost_lines() -> float:
    return metrics.metrics().audit_lost.labels("demo")._value.get()


def test_a_line_has_the_request_and_its_outcome(set_audit, tmp_path):
    set_audit(tmp_path / "audit.jsonl")
    ask()
    ask(diversity=0.2)
    ask(vllm_xargs={"diversity": "0.9"})
    for wrong in ({"diversity": PROMPT}, {"style": PROMPT}, {"diversity": {PROMPT: 1}}):
        with pytest.raises(VLLMValidationError):
            ask(**wrong)
    text = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["outcome"] for line in lines] == ["accepted", "clamped", *["refused"] * 3]
    assert [line["asked"]["diversity"]["level"] for line in lines[:2]] == [0.2, 0.9]
    assert [line["effective"]["diversity"]["level"] for line in lines[:2]] == [0.2, 0.5]
    assert [line["param"] for line in lines[2:]] == ["diversity", "style", "diversity"]
    assert {line["key"] for line in lines} == {hashlib.sha256(KEY.encode()).hexdigest()[:12]}
    assert {line["request_id"] for line in lines} == {"r" * audit.LONGEST_NAME}
    assert {line["model"] for line in lines} == {"demo"}
    assert "canary" not in text
    assert KEY not in text
    assert os.stat(tmp_path / "audit.jsonl").st_mode & 0o077 == 0


def test_the_operator_s_default_is_logged_as_not_requested(set_audit, tmp_path, monkeypatch):
    set_audit(tmp_path / "audit.jsonl")
    monkeypatch.setattr(request_params, "default_diversity", lambda: spec.parse(0.9))
    ask()
    (line,) = map(json.loads, (tmp_path / "audit.jsonl").read_text().splitlines())
    assert line["asked"] is None
    assert line["effective"]["diversity"]["level"] == 0.5


@pytest.mark.parametrize("obstacle", ["missing folder", "a pipe", "a link", "a full disk"])
def test_requests_succeed_when_the_log_cannot_be_written(
    set_audit, tmp_path, monkeypatch, caplog, obstacle
):
    file = tmp_path / "audit.jsonl"
    if obstacle == "missing folder":
        file = tmp_path / "none" / "audit.jsonl"
    elif obstacle == "a pipe":
        os.mkfifo(file)
    elif obstacle == "a link":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(audit.os, "write", lambda *_: (_ for _ in ()).throw(full))
    set_audit(file)
    monkeypatch.setattr(log.logger, "propagate", True)
    before = lost_lines()
    for _ in range(3):
        assert ask(diversity=0.2).extra_args["diversity"]["level"] == 0.2
    assert lost_lines() - before == 3
    assert caplog.text.count("the audit log has gaps") == 1
    assert not (tmp_path / "elsewhere").exists()


TEXTS = {
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": ["IBAN DE89 3704", "\u20ac" * 64],
    "group": {"id": "patient Jane Doe, ward 7", "index": 1, "size": 4},
}


def has_client_text(line) -> bool:
    return any(text in json.dumps(line) for text in ("IBAN", "Jane", "\\u20ac"))


@pytest.mark.parametrize(
    "fields", [{"diversity": TEXTS}, {"vllm_xargs": {"diversity": json.dumps(TEXTS)}}]
)
def test_breakers_are_logged_as_their_number_and_an_id_as_a_digest(
    set_audit, tmp_path, monkeypatch, fields
):
    set_audit(tmp_path / "audit.jsonl")
    monkeypatch.setattr(engine, "refusal_of", lambda _: None)  # As with a tokenizer.
    ask(**fields)
    (line,) = lines_of(tmp_path / "audit.jsonl")
    assert not has_client_text(line)
    digest = hashlib.sha256(TEXTS["group"]["id"].encode()).hexdigest()[:12]
    for logged in (line["asked"]["diversity"], line["effective"]["diversity"]):
        assert logged["dry_sequence_breakers"] == 2
        assert logged["group"] == {"id": digest, "index": 1, "size": 4}


@pytest.mark.parametrize(
    "diversity",
    [
        TEXTS,  # This engine has no tokenizer.
        {"dry_sequence_breakers": ["IBAN DE89 3704"]},
        {"level": 0.1, "group": {"id": "Jane Doe", "index": 9, "size": 4}},
        {"level": 0.1, "Jane Doe": 1},
    ],
)
def test_the_line_of_a_refusal_has_no_client_text(set_audit, tmp_path, diversity):
    set_audit(tmp_path / "audit.jsonl")
    with pytest.raises(VLLMValidationError):
        ask(diversity=diversity)
    (line,) = lines_of(tmp_path / "audit.jsonl")
    assert line["outcome"] == "refused"
    assert not has_client_text(line)


def test_a_body_of_many_prompts_is_one_line(set_audit, tmp_path):
    set_audit(tmp_path / "audit.jsonl")
    sampling_params(1000, diversity=0.2)
    audit.write_notes(request_context.current.get())
    (line,) = lines_of(tmp_path / "audit.jsonl")
    assert line["prompts"] == 1000
    assert os.stat(tmp_path / "audit.jsonl").st_size < 1000


def test_outside_of_an_http_request_each_prompt_is_a_line(set_audit, tmp_path):
    """As in `vllm run-batch`."""
    set_audit(tmp_path / "audit.jsonl")
    token = request_context.current.set(None)
    sampling_params(2, diversity=0.2)
    request_context.current.reset(token)
    assert [line["prompts"] for line in lines_of(tmp_path / "audit.jsonl")] == [1, 1]


class UnansweredError(Exception):
    """An exception that vLLM's handlers do not handle."""


@pytest.mark.parametrize(
    ("answered", "outcome", "status"),
    [
        (200, "accepted", 200),
        (400, "failed", 400),  # vLLM's own refusal, as it admits the request.
        (503, "failed", 503),
        (UnansweredError, "failed", 500),
        (asyncio.CancelledError, "failed", None),
    ],
)
def test_a_line_is_written_when_the_answer_begins_or_fails(
    set_audit, tmp_path, answered, outcome, status
):
    """The line has the outcome; a client that disconnects leaves one too."""
    file = tmp_path / "audit.jsonl"
    set_audit(file)
    seen = []

    async def app(scope, receive, send):
        sampling_params(2, diversity=0.2)
        if not isinstance(answered, int):
            raise answered
        await send({"type": "http.response.start", "status": answered, "headers": []})
        seen.append(len(lines_of(file)))
        await send({"type": "http.response.body", "body": b"{}"})

    async def nowhere(message=None):
        return {}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    is_answered = isinstance(answered, int)
    with contextlib.nullcontext() if is_answered else pytest.raises(answered):
        asyncio.run(ResponseMiddleware(app)(scope, nowhere, nowhere))
    assert seen == [1] * is_answered
    (line,) = lines_of(file)
    assert line["prompts"] == 2
    assert (line["outcome"], line["status"]) == (outcome, status)


def counter_values(name) -> dict[tuple[str, ...], float]:
    """The values of one of our counters, by labels."""
    (family,) = getattr(metrics.metrics(), name).collect()
    return {
        tuple(sample.labels.values()): sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def increase(name, before) -> dict[tuple[str, ...], float]:
    after = counter_values(name)
    return {labels: rise for labels in after if (rise := after[labels] - before.get(labels, 0))}


def test_a_body_of_many_prompts_is_counted_once(set_audit, tmp_path, monkeypatch):
    """Like its refusal, because an alert compares the two."""
    set_audit(tmp_path / "audit.jsonl")
    profile = SimpleNamespace(name="habits", strength=1.0, max_kl=0.05)
    monkeypatch.setattr(engine, "styles", lambda: Styles((profile,)))
    names = ("requests", "styled", "clamped", "refused")
    before = {name: counter_values(name) for name in names}
    for _ in range(2):
        token = request_context.current.set(RequestContext(HEADERS))
        sampling_params(100, diversity=0.9, style="habits")
        with pytest.raises(VLLMValidationError):
            sampling_params(100, diversity=7)
        request_context.current.reset(token)
    expected = {"requests": ("demo", "gated"), "styled": ("demo", "habits")}
    for name in names:
        labels = expected.get(name, ("demo",))
        assert increase(name, before[name]) == {labels: 2}


def test_a_request_with_two_laws_is_counted_for_each(set_audit, tmp_path):
    """As when the requests of a batch differ."""
    set_audit(tmp_path / "audit.jsonl")
    before = counter_values("requests")
    for law in ({"level": 0.2}, {"law": "guard", "min_p": 0.1}, {"level": 0.1}):
        sampling_params(2, diversity=law)
    rise = increase("requests", before)
    assert rise == {("demo", "gated"): 1, ("demo", "guard"): 1}


class Disk:
    """`os.write` on a disk with `left` free bytes."""

    def __init__(self, monkeypatch) -> None:
        self.left = 0
        self._write = os.write
        monkeypatch.setattr(audit.os, "write", self.write)

    def write(self, descriptor, line) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, line[: self.left])
        self.left -= written
        return written


@pytest.mark.parametrize("writer", ["the same", "another process", "the next start"])
def test_after_a_full_disk_lines_are_complete_again(tmp_path, monkeypatch, writer):
    file, disk = tmp_path / "audit.jsonl", Disk(monkeypatch)
    settings = Audit(file=str(file))
    first, other = audit.AuditLog(settings), audit.AuditLog(settings)
    disk.left = 1000
    first.write({"number": 0})
    other.write({"number": 1})
    disk.left = 20
    for _ in range(3):
        with pytest.raises(OSError, match=r"cut|No space"):
            first.write({"number": 2, "rest": "y" * 40})
    disk.left = 1000
    last = {"the same": first, "another process": other}.get(writer, audit.AuditLog(settings))
    last.write({"number": 3})
    first.write({"number": 4})
    lines = file.read_text().splitlines()
    assert len(lines.pop(2)) == 20
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 3, 4]
    for log_ in (first, other, last):
        log_.close()


@pytest.mark.parametrize("size", [100, 2_000_000])
def test_a_file_that_is_already_too_large_is_renamed(tmp_path, monkeypatch, size):
    """As after `largest_mib` was lowered."""
    monkeypatch.setattr(audit, "MIB", 100)
    file = tmp_path / "audit.jsonl"
    file.write_text("x" * (size - 1) + "\n")
    writer = audit.AuditLog(Audit(file=str(file), largest_mib=1))
    writer.write({"number": 0})
    writer.close()
    assert json.loads(file.read_text()) == {"number": 0}
    assert os.stat(f"{file}.1").st_size == size


def test_files_beyond_a_lowered_keep_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "MIB", 10)
    file = tmp_path / "audit.jsonl"
    for name in ("1", "2", "3", "4", "20261128", "1.gz"):
        (tmp_path / f"audit.jsonl.{name}").write_text("older")
    writer = audit.AuditLog(Audit(file=str(file), largest_mib=1, keep=2))
    for number in range(2):
        writer.write({"number": number})
    writer.close()
    left = sorted(path.name.removeprefix("audit.jsonl") for path in tmp_path.iterdir())
    assert left == ["", ".1", ".1.gz", ".2", ".20261128"]


def test_files_are_renamed_by_size_and_the_oldest_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "MIB", 100)
    file = tmp_path / "audit.jsonl"
    settings = Audit(file=str(file), largest_mib=1, keep=2)
    writers = [audit.AuditLog(settings), audit.AuditLog(settings)]  # As of two processes.
    for number in range(60):
        writers[number % 2].write({"number": number})
    for writer in writers:
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "audit.jsonl",
        "audit.jsonl.1",
        "audit.jsonl.2",
    ]
    paths = (f"{file}.2", f"{file}.1", file)
    lines = [line for path in paths for line in Path(path).read_text().splitlines()]
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == list(range(60 - len(numbers), 60))
    assert all(os.stat(path).st_size < 100 + 20 for path in paths)


@pytest.fixture
def no_blocking_lock(monkeypatch):
    """Fails the test on a blocking lock, which would wait forever."""
    flock = fcntl.flock

    def try_lock(descriptor, operation):
        assert operation & fcntl.LOCK_NB, (
            "it would wait for another process, and so would all requests"
        )
        flock(descriptor, operation)

    monkeypatch.setattr(audit.fcntl, "flock", try_lock)


@pytest.mark.parametrize("is_renamed", [False, True])
def test_no_line_waits_or_is_lost_while_another_process_renames_files(
    tmp_path, monkeypatch, no_blocking_lock, is_renamed
):
    monkeypatch.setattr(audit, "MIB", 30)
    file = tmp_path / "audit.jsonl"
    writer = audit.AuditLog(Audit(file=str(file), largest_mib=1, keep=2))
    for number in range(3):
        writer.write({"number": number})  # The file reaches its size limit.
    with file.open() as locked:  # A lock belongs to the open file, so this acts as another process.
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        writer.write({"number": 3})
        if is_renamed:
            file.rename(f"{file}.1")
        writer.write({"number": 4})
    writer.write({"number": 5})
    writer.close()
    first, second = Path(f"{file}.1"), file
    assert [[line["number"] for line in lines_of(path)] for path in (first, second)] == (
        [[0, 1, 2, 3], [4, 5]] if is_renamed else [[0, 1, 2, 3, 4], [5]]
    )
