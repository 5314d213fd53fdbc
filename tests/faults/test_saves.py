"""Kills, full disks, read-only folders and flipped bits: what is saved is intact, and runs resume.

The property: whatever ended a run or a build, every checkpoint under its final name is intact, and
the same command then ends in the same bits as an uninterrupted one, without left-over files.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGXFSZ
from typing import Any

import pytest

from dftserve import checkpoint
from dftserve.checkpoint import CheckpointError
from dftserve.targets.store import StoreError, TargetStore
from tests.conftest import ROOT, long
from tests.training import WORDS, save_model, save_store

SHORT_RUN_EVENTS = 3
"""Number of events that a short test run tries, spread over all of them."""
RECIPE = {
    "name": "small",
    "about": "Two words before.",
    "text": "Any.",
    "corpus": {"min_words": 1, "duplicate_threshold": None, "max_repeated_grams": 1.0},
    "store": {"k": 6, "draws": 6},
    "source": {"ngram": {"order": 3}},
}


@dataclass(frozen=True)
class Work:
    """A command, and its results without interruption."""

    run: Callable[..., dict[str, Any]]
    """run(folder, **fault)"""
    check: Callable[[Path], None]
    """Asserts that every checkpoint or store in the folder is intact."""
    result: Callable[[Path], dict[str, bytes]]
    sizes: tuple[int, ...]
    """Limits of file sizes to test: each is exceeded by some write."""
    folder: Path
    events: int
    seconds: float


@pytest.fixture(scope="module")
def order() -> Iterator[Callable[..., dict[str, Any]]]:
    command = [sys.executable, "-m", "tests.faults.saves_driver"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None

        def send(**content: Any) -> dict[str, Any]:
            driver.stdin.write(json.dumps(content) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        yield send
        driver.stdin.close()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A model, a store to train on, and a corpus to build from."""
    workspace = tmp_path_factory.mktemp("saves")
    save_model(workspace / "base")
    save_store(workspace / "store")
    (workspace / "corpus").mkdir()
    source = random.Random(0)
    for i in range(8):
        text = " ".join(source.choices(WORDS, k=120))
        (workspace / "corpus" / f"{i}.txt").write_text(text)
    (workspace / "recipe.yaml").write_text(json.dumps(RECIPE))
    return workspace


@pytest.fixture(scope="module")
def training(order, workspace) -> Work:
    return _training(order, workspace, "run", steps=6, save_every=2, evaluate_every=3)


@pytest.fixture(scope="module")
def stopping(order, workspace) -> Work:
    """A training that stops early because its held-out metrics get worse."""
    work = _training(
        order, workspace, "stopped", steps=20, evaluate_every=1, patience=2, learning_rate=0.9
    )
    assert not (work.folder / "checkpoint-20").exists()
    return work


def _training(order, workspace: Path, name: str, **given: Any) -> Work:
    settings = {
        "model": str(workspace / "base"),
        "targets": str(workspace / "store"),
        "max_length": 64,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        **given,
    }

    def run(folder: Path, **fault: Any) -> dict[str, Any]:
        content = {**settings, "output": str(folder)}
        return order(do="train", folder=str(folder), settings=content, **fault)

    sizes = (0, 500, 20_000, 100_000, 164_000)
    return _uninterrupted(run, check_run, weights, sizes, workspace / name)


@pytest.fixture(scope="module")
def building(order, workspace) -> Work:
    settings = {
        "corpus": str(workspace / "corpus"),
        "model": str(workspace / "base"),
        "recipe": str(workspace / "recipe.yaml"),
        "heldout": 0.2,
    }

    def run(folder: Path, **fault: Any) -> dict[str, Any]:
        content = {**settings, "out": str(folder)}
        fields = {"do": "build", "folder": str(folder), "shard_tokens": 250}
        return order(settings=content, **fields, **fault)

    sizes = (0, 500, 1500, 10_000, 18_000)
    return _uninterrupted(run, check_store, contents, sizes, workspace / "built")


def _uninterrupted(run, check, result, sizes: tuple[int, ...], folder: Path) -> Work:
    answer = run(folder)
    assert answer["ended"] == 0, answer
    check(folder)
    return Work(run, check, result, sizes, folder, answer["events"], answer["seconds"])


@pytest.fixture
def work(request) -> Work:
    return request.getfixturevalue(request.param)


BOTH = ("training", "building")


TRAINING_IS_LONG = (long("training"), "building")
"""Training takes half a minute to a minute and a half of each test."""


def each_work(short: int, long_run: int | None) -> list:
    """(work, number of events) for the short and the long tests; None: all events."""
    return [(name, short) for name in BOTH] + [long(name, long_run) for name in BOTH]


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────


def check_run(folder: Path) -> None:
    for each in (*folder.glob("checkpoint-*"), *folder.glob("final")):
        if not each.name.endswith(".partial"):
            checkpoint.verify(each)


def check_store(folder: Path) -> None:
    if (folder / "manifest.json").exists():
        TargetStore(folder).verify()


def weights(folder: Path) -> dict[str, bytes]:
    return {"weights": (folder / "final" / "model.safetensors").read_bytes()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def check_resumes(work: Work, folder: Path) -> None:
    """Check the property in the docstring of this module."""
    work.check(folder)
    finished = (folder / "final").exists()
    answer = work.run(folder)
    if finished:
        assert "this run is finished" in answer["error"]
    else:
        assert answer["ended"] == 0, answer
    work.check(folder)
    assert names(folder) == names(work.folder)
    assert work.result(folder) == work.result(work.folder)


def spread(events: int, count: int | None) -> list[int]:
    """`count` of all events, from the first to the last; None: all."""
    if count is None:
        return list(range(events))
    return [round(i * (events - 1) / (count - 1)) for i in range(count)]


# ── Kills ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("work", "count"), each_work(SHORT_RUN_EVENTS, None), indirect=["work"])
def test_a_kill_at_any_write_sync_or_rename(work, count, tmp_path, record_values):
    events = spread(work.events, count)
    for event in events:
        folder = tmp_path / str(event)
        assert work.run(folder, kill_at=event)["ended"] == -SIGKILL
        check_resumes(work, folder)
    record_values(kills=len(events), events=work.events)


@pytest.mark.parametrize("count", [2, long(None)])
def test_a_kill_of_a_run_that_stops_early(stopping, count, tmp_path, record_values):
    events = spread(stopping.events, count)
    for event in events:
        folder = tmp_path / str(event)
        assert stopping.run(folder, kill_at=event)["ended"] == -SIGKILL
        check_resumes(stopping, folder)
    record_values(kills=len(events), events=stopping.events)


@pytest.mark.parametrize("work", TRAINING_IS_LONG, indirect=True)
def test_a_kill_in_the_middle_of_a_write_is_survived(work, tmp_path):
    for size in work.sizes:
        folder = tmp_path / str(size)
        assert work.run(folder, largest=size, kill=True)["ended"] == -SIGXFSZ
        check_resumes(work, folder)


@pytest.mark.parametrize(
    ("work", "count"),
    [("building", 2), *(long(name, 20) for name in BOTH)],
    indirect=["work"],
)
def test_a_kill_at_any_time(work, count, tmp_path, record_values):
    source = random.Random(0)
    ends = []
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        ends.append(work.run(folder, after=source.uniform(0, work.seconds))["ended"])
        check_resumes(work, folder)
    assert set(ends) <= {0, -SIGKILL}
    record_values(kills=ends.count(-SIGKILL))


# ── Disks ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("work", "count"), each_work(SHORT_RUN_EVENTS, None), indirect=["work"])
def test_a_disk_that_is_full_from_any_event_on(work, count, tmp_path, record_values):
    failed = 0
    for event in spread(work.events, count):
        folder = tmp_path / str(event)
        answer = work.run(folder, full_at=event)
        if answer["ended"]:
            failed += 1
            check_clear_error(answer, "No space left on device")
        assert not folder.exists() or not list(folder.rglob("*.partial"))
        check_resumes(work, folder)
    assert failed >= min(count or work.events, work.events) - 2
    record_values(failures=failed, events=work.events)


@pytest.mark.parametrize("work", TRAINING_IS_LONG, indirect=True)
def test_a_file_size_limit_is_a_clear_error(work, tmp_path):
    """For files written by Python, Rust (safetensors) and C++ (torch)."""
    for size in work.sizes:
        folder = tmp_path / str(size)
        check_clear_error(work.run(folder, largest=size), "File too large", "cannot be written")
        assert not list(folder.rglob("*.partial"))
        check_resumes(work, folder)


@pytest.mark.parametrize("work", BOTH, indirect=True)
@pytest.mark.parametrize("exists", [False, True])
def test_a_read_only_folder_is_a_clear_error_and_unchanged(work, exists, tmp_path):
    folder = tmp_path / "shut" / "out"
    folder.parent.mkdir()
    if exists:
        work.run(folder, kill_at=work.events * 2 // 3)
    read_only = folder if exists else folder.parent
    before = names(folder)
    read_only.chmod(0o555)
    try:
        answer = work.run(folder, bound=True)
    finally:
        read_only.chmod(0o755)
    if "capset" in answer.get("error", ""):
        pytest.skip(answer["error"])
    check_clear_error(answer, "Permission denied")
    assert {name for name in names(folder) if ".partial" not in name} == {
        name for name in before if ".partial" not in name
    }
    check_resumes(work, folder)


@pytest.mark.parametrize("work", BOTH, indirect=True)
def test_a_folder_below_a_file_is_a_clear_error(work, tmp_path):
    (tmp_path / "file").write_text("mine")
    check_clear_error(work.run(tmp_path / "file" / "out"), "Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


def check_clear_error(answer: dict[str, Any], *reasons: str) -> None:
    """Check that the error is one that the command line shows as one line."""
    assert answer["ended"] == 1, answer
    assert {"OSError", "StoreError"} & set(answer["kinds"]), answer["trace"]
    assert any(reason in answer["error"] for reason in reasons), answer["error"]
    assert "\n" not in answer["error"]


# ── Flipped bits ─────────────────────────────────────────────────────────────────────────────────


def verify_store(folder: Path) -> None:
    TargetStore(folder).verify()


@pytest.mark.parametrize("count", [100, long(1000)])
def test_every_flipped_bit_is_found_and_its_file_named(training, building, count, record_values):
    verified = [
        *((training.folder / name, checkpoint.verify) for name in ("checkpoint-6", "final")),
        (building.folder, verify_store),
    ]
    source = random.Random(0)
    flipped: dict[str, int] = {}
    for _ in range(count):
        folder, verify = source.choice(verified)
        path = source.choice(sorted(folder.iterdir()))
        with flipped_bit(path, source), pytest.raises((CheckpointError, StoreError)) as caught:
            verify(folder)
        assert path.name in str(caught.value)
        flipped[path.name] = flipped.get(path.name, 0) + 1
    for folder, verify in verified:
        verify(folder)
    record_values(flips=count, found=sum(flipped.values()), files=len(flipped))


@contextmanager
def flipped_bit(path: Path, source: random.Random) -> Iterator[None]:
    """Flip one bit of a file; it is restored at the end."""
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[source.randrange(len(original))] ^= 1 << source.randrange(8)
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(original)
