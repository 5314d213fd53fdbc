"""`target build --engine ray`: the same store as the local engine's, also after lost workers."""

import importlib
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dftserve.serve import held_port
from dftserve.targets import on_ray, store
from dftserve.targets.document import Document
from dftserve.targets.on_ray import Cluster
from dftserve.targets.source import DenseSource, Rows
from tests.ray.conftest import WORKERS
from tests.unit.test_target_cli import build, bytes_of, make_tokenizer, refused, save_novels

V = 50
CLUSTER = Cluster(address=None, workers=WORKERS, loads_models=False)


class PredictableSource(DenseSource):
    """Logits that depend on the token before; `disturb` is called at every read."""

    vocabulary = V

    def __init__(self, disturb: Any = None, name: str = "certain") -> None:
        self._disturb, self._name = disturb, name

    def describe(self) -> Mapping[str, Any]:
        return {"kind": self._name}

    def read(self, documents: Sequence[Document]) -> list[Rows]:
        if self._disturb is not None:
            self._disturb()
        return [self._rows(document) for document in documents]

    def _rows(self, document: Document) -> Rows:
        def rows(start: int, stop: int) -> Tensor:
            before_R = document.tokens_N[document.positions_T[start:stop] - 1].astype(int)
            logits_RV = torch.sin(torch.arange(V) * (1.0 + torch.from_numpy(before_R))[:, None])
            return logits_RV.log_softmax(1)

        return rows


class SignalOnce:
    """Sends a signal to the first process that calls it, and to no other."""

    def __init__(self, mark: Path, number: int = signal.SIGKILL) -> None:
        self._mark, self._number = mark, number

    def __call__(self) -> None:
        try:
            self._mark.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), self._number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def some_documents(number: int) -> dict[str, list[Document]]:
    """`number` documents of 100 tokens to train on, and two that are held out."""
    source = np.random.default_rng(0)

    def document() -> Document:
        tokens_N = source.integers(0, V, size=100).astype(np.int32)
        return Document(tokens_N, np.arange(100) > 0)

    return {"train": [document() for _ in range(number)], "heldout": [document() for _ in range(2)]}


@pytest.fixture
def documents(monkeypatch) -> dict[str, list[Document]]:
    """Documents for six training shards and one held-out shard."""
    monkeypatch.setattr(store, "SHARD_TOKENS", 300)
    documents_by_split = some_documents(17)
    assert len(store.parts_of(documents_by_split)) == 7
    return documents_by_split


def make_plan(documents, source=None) -> store.Plan:
    return store.plan(
        source or PredictableSource(),
        documents,
        tokenizer="t",
        template=None,
        corpus={},
        k=4,
        draws=3,
        seed=1,
    )


def build_on_ray(folder: Path, documents, make, say=print, cluster=CLUSTER) -> list[int]:
    plan = make_plan(documents)
    store.begin(folder, plan)
    return list(on_ray.build(folder, plan, documents, make, cluster, say))


@pytest.fixture
def local(tmp_path, documents) -> dict[str, bytes]:
    store.write(tmp_path / "local", make_plan(documents), PredictableSource(), documents)
    return bytes_of(tmp_path / "local")


def finish_store(folder: Path, documents) -> dict[str, bytes]:
    store.finish(folder, make_plan(documents), documents, store.versions())
    return bytes_of(folder)


def test_ray_builds_the_store_of_the_local_engine(cluster, tmp_path, documents, local):
    """If a shard is missing, only that one is written again."""
    folder = tmp_path / "ray"
    done = build_on_ray(folder, documents, lambda _: PredictableSource())
    assert sorted(done) == sorted(part.tokens for part in store.parts_of(documents))
    removed = folder / "train-00003.safetensors"
    removed.unlink()
    others = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(build_on_ray(folder, documents, lambda _: PredictableSource())) == sorted(done)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert finish_store(folder, documents) == local


def test_a_complete_store_needs_no_cluster(tmp_path, documents, local):
    folder = tmp_path / "local"
    plan = make_plan(documents)
    token_counts = on_ray.build(
        folder, plan, documents, lambda _: PredictableSource(), CLUSTER, print
    )
    assert sum(token_counts) == sum(part.tokens for part in store.parts_of(documents))


def test_a_killed_worker_is_replaced(cluster, tmp_path, documents, local):
    lines: list[str] = []
    disturbance = SignalOnce(tmp_path / "killed")
    build_on_ray(
        tmp_path / "ray", documents, lambda _: PredictableSource(disturbance), lines.append
    )
    assert (tmp_path / "killed").exists()
    assert [line for line in lines if "its worker was lost (ActorDiedError)" in line]
    assert finish_store(tmp_path / "ray", documents) == local


@pytest.mark.long
def test_a_worker_that_is_killed_while_starting_is_replaced(cluster, tmp_path, documents, local):
    disturbance = SignalOnce(tmp_path / "killed")

    def make(_: object) -> PredictableSource:
        disturbance()
        return PredictableSource()

    lines: list[str] = []
    build_on_ray(tmp_path / "ray", documents, make, lines.append)
    assert [line for line in lines if line.startswith("  a start: its worker was lost")]
    assert finish_store(tmp_path / "ray", documents) == local


@pytest.mark.long
@pytest.mark.parametrize("when", ["reading", "starting"])
def test_workers_that_are_lost_every_time_end_the_build(cluster, tmp_path, documents, when):
    def make(_: object) -> PredictableSource:
        if when == "starting":
            die()
        return PredictableSource(die)

    of = "a start" if when == "starting" else r"train-0000\d.safetensors"
    with pytest.raises(RuntimeError, match=rf"{of}: its worker was lost 5 times.*--processes"):
        build_on_ray(tmp_path / "ray", documents, make)
    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("kind", "reported"),
    [
        (ValueError, ValueError),
        pytest.param(OSError, RuntimeError, marks=pytest.mark.long),
        pytest.param(KeyError, RuntimeError, marks=pytest.mark.long),
    ],
)
def test_an_exception_of_a_worker_is_reported(cluster, tmp_path, documents, kind, reported):
    def make(_: object) -> PredictableSource:
        raise kind("no model at models/base")

    with pytest.raises(reported, match=r"a worker of the Ray cluster: .*no model at models/base"):
        build_on_ray(tmp_path / "ray", documents, make)


@pytest.mark.long
def test_a_worker_with_another_source_is_refused(cluster, tmp_path, documents):
    with pytest.raises(ValueError, match='kind is "other" there and "certain" here'):
        build_on_ray(tmp_path / "ray", documents, lambda _: PredictableSource(name="other"))


@pytest.mark.long
def test_a_worker_without_the_package_is_reported(cluster, tmp_path, documents, monkeypatch):
    """The class is from a module that this process has imported and the workers cannot find."""
    code = tmp_path / "only_here.py"
    code.write_text("from dftserve.targets import on_ray\nclass Worker(on_ray._Worker): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(on_ray, "_Worker", importlib.import_module("only_here").Worker)
    code.unlink()
    with pytest.raises(RuntimeError, match=r"cannot be made: .*only_here.*; install the same"):
        build_on_ray(tmp_path / "ray", documents, lambda _: PredictableSource())


@pytest.mark.long
def test_workers_with_other_versions_are_refused(cluster, tmp_path, documents, monkeypatch):
    ours = store.versions()
    monkeypatch.setattr(store, "versions", lambda: {**ours, "torch": "1.0"})
    with pytest.raises(RuntimeError, match=r"this process .*'torch': '1.0'.*Install the same"):
        build_on_ray(tmp_path / "ray", documents, lambda _: PredictableSource())


@pytest.mark.long
def test_a_worker_reads_one_shard_at_a_time(cluster, tmp_path, documents):
    """The number of workers is as requested, with or without GPUs."""
    running, counts = tmp_path / "running", tmp_path / "counts"
    running.mkdir()
    counts.mkdir()

    def count() -> None:
        mine = running / f"{os.getpid()}-{random.random()}"
        mine.touch()
        (counts / mine.name).write_text(str(len(list(running.iterdir()))))
        mine.unlink()

    one = Cluster(address=None, workers=1, loads_models=True)
    build_on_ray(tmp_path / "ray", documents, lambda _: PredictableSource(count), cluster=one)
    assert {path.read_text() for path in counts.iterdir()} == {"1"}
    assert len({path.name.partition("-")[0] for path in counts.iterdir()}) == 1


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def novels(tmp_path) -> Path:
    return save_novels(tmp_path / "novels")


def test_the_build_command_on_ray(cluster, tmp_path, novels, model, monkeypatch):
    """With a shipped recipe; relative paths are valid for the workers too."""
    monkeypatch.setattr(store, "SHARD_TOKENS", 1500)
    monkeypatch.chdir(tmp_path)
    assert build("novels", model, "local").exit_code == 0
    result = build("novels", model, "on-ray", "--engine", "ray", "--processes", 2)
    assert result.exit_code == 0, result.output
    assert len(bytes_of(tmp_path / "local")) > 3
    assert bytes_of(tmp_path / "on-ray") == bytes_of(tmp_path / "local")


@pytest.mark.parametrize(
    "engine",
    ["Ray", "ray://", "ray://host", "http://127.0.0.1:10001", "ray://a b:1", "ray://a:70000", ""],
)
def test_invalid_engines_are_refused(tmp_path, novels, model, engine):
    result = build(novels, model, tmp_path / "out", "--engine", engine)
    refused(result, "engine: got", "accepted: local, ray, ray://HOST:PORT")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def unused_port(monkeypatch, tmp_path) -> Iterator[int]:
    """A port on which nothing listens; no cluster of this machine can be found."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray-tmp"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with held_port() as port:
        yield port


@pytest.mark.parametrize("how", ["--engine", "RAY_ADDRESS", "ray_current_cluster"])
def test_an_unreachable_cluster_is_reported_before_texts_are_read(
    tmp_path, novels, model, monkeypatch, unused_port, how
):
    engine, address = "ray", f"127.0.0.1:{unused_port}"
    if how == "--engine":
        engine = address = f"ray://{address}"
    elif how == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        (tmp_path / "ray-tmp" / "ray").mkdir(parents=True)
        (tmp_path / "ray-tmp" / "ray" / "ray_current_cluster").write_text(address)
    result = build(novels, model, tmp_path / "out", "--engine", engine)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(f"Error: no Ray cluster answers at {address}")
    assert how in result.output
    assert "texts read" not in result.output
    assert not (tmp_path / "out").exists()


def test_without_ray_the_build_is_refused(tmp_path, novels, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = build(novels, model, tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 1
    assert "Error: the engine ray needs Ray: pip install 'dftserve[ray]'." in result.output
    assert not (tmp_path / "out").exists()


def test_a_plan_says_that_it_measured_locally(tmp_path, novels, model):
    result = build(novels, model, tmp_path / "out", "--engine", "ray", "--plan")
    assert result.exit_code == 0, result.output
    assert "Measured on this machine; the Ray cluster is not asked." in result.output
