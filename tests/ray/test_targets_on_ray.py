"""`target build --engine ray`: the local store bit for bit, whoever is lost on the way."""

import importlib
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dftserve.targets import on_ray, store
from dftserve.targets.document import Document
from dftserve.targets.on_ray import Cluster
from dftserve.targets.source import DenseSource, Rows
from tests.ray.conftest import WORKERS
from tests.unit.test_target_cli import build, bytes_of, make_tokenizer, refused, save_novels

V = 50
SOME = Cluster(address=None, workers=WORKERS, loads_models=False)


class Certain(DenseSource):
    """Logits that follow from the token before; what a worker does on the way is `disturb`'s."""

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


class Once:
    """Does something in the first process that takes it, and in no other."""

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
    """Of a hundred tokens; two more are held out."""
    source = np.random.default_rng(0)

    def document() -> Document:
        tokens_N = source.integers(0, V, size=100).astype(np.int32)
        return Document(tokens_N, np.arange(100) > 0)

    return {"train": [document() for _ in range(number)], "heldout": [document() for _ in range(2)]}


@pytest.fixture
def documents(monkeypatch) -> dict[str, list[Document]]:
    """Six shards to train on and one that is held out."""
    monkeypatch.setattr(store, "SHARD_TOKENS", 300)
    made = some_documents(17)
    assert len(store.parts_of(made)) == 7
    return made


def planned(documents, source=None) -> store.Plan:
    return store.plan(
        source or Certain(),
        documents,
        tokenizer="t",
        template=None,
        corpus={},
        k=4,
        draws=3,
        seed=1,
    )


def built_on_ray(folder: Path, documents, make, say=print, cluster=SOME) -> list[int]:
    plan = planned(documents)
    store.begin(folder, plan)
    return list(on_ray.build(folder, plan, documents, make, cluster, say))


@pytest.fixture
def local(tmp_path, documents) -> dict[str, bytes]:
    store.write(tmp_path / "local", planned(documents), Certain(), documents)
    return bytes_of(tmp_path / "local")


def finished(folder: Path, documents) -> dict[str, bytes]:
    store.finish(folder, planned(documents), documents, store.versions())
    return bytes_of(folder)


def test_the_same_store_as_the_local_engine(cluster, tmp_path, documents, local):
    """And where one shard is missing, that one is read again, and no other."""
    folder = tmp_path / "ray"
    done = built_on_ray(folder, documents, lambda _: Certain())
    assert sorted(done) == sorted(part.tokens for part in store.parts_of(documents))
    gone = folder / "train-00003.safetensors"
    gone.unlink()
    others = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(built_on_ray(folder, documents, lambda _: Certain())) == sorted(done)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert finished(folder, documents) == local


def test_where_nothing_is_missing_no_worker_is_asked(tmp_path, documents, local):
    """Without a cluster, even."""
    folder = tmp_path / "local"
    plan = planned(documents)
    given = on_ray.build(folder, plan, documents, lambda _: Certain(), SOME, print)
    assert sum(given) == sum(part.tokens for part in store.parts_of(documents))


def test_a_worker_that_is_killed_is_replaced(cluster, tmp_path, documents, local):
    said: list[str] = []
    disturbance = Once(tmp_path / "killed")
    built_on_ray(tmp_path / "ray", documents, lambda _: Certain(disturbance), said.append)
    assert (tmp_path / "killed").exists()
    assert [line for line in said if "its worker was lost (ActorDiedError)" in line]
    assert finished(tmp_path / "ray", documents) == local


@pytest.mark.long
def test_a_worker_that_is_killed_as_it_starts_is_replaced(cluster, tmp_path, documents, local):
    disturbance = Once(tmp_path / "killed")

    def make(_: object) -> Certain:
        disturbance()
        return Certain()

    said: list[str] = []
    built_on_ray(tmp_path / "ray", documents, make, said.append)
    assert [line for line in said if line.startswith("  a start: its worker was lost")]
    assert finished(tmp_path / "ray", documents) == local


@pytest.mark.long
@pytest.mark.parametrize("when", ["reading", "starting"])
def test_workers_that_are_always_lost_end_the_build(cluster, tmp_path, documents, when):
    def make(_: object) -> Certain:
        if when == "starting":
            die()
        return Certain(die)

    of = "a start" if when == "starting" else r"train-0000\d.safetensors"
    with pytest.raises(RuntimeError, match=rf"{of}: its worker was lost 5 times.*--processes"):
        built_on_ray(tmp_path / "ray", documents, make)
    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (ValueError, ValueError),
        pytest.param(OSError, RuntimeError, marks=pytest.mark.long),
        pytest.param(KeyError, RuntimeError, marks=pytest.mark.long),
    ],
)
def test_what_a_worker_raises_is_told(cluster, tmp_path, documents, kind, told):
    def make(_: object) -> Certain:
        raise kind("no model at models/base")

    with pytest.raises(told, match=r"a worker of the Ray cluster: .*no model at models/base"):
        built_on_ray(tmp_path / "ray", documents, make)


@pytest.mark.long
def test_another_source_is_refused(cluster, tmp_path, documents):
    with pytest.raises(ValueError, match='kind is "other" there and "certain" here'):
        built_on_ray(tmp_path / "ray", documents, lambda _: Certain(name="other"))


@pytest.mark.long
def test_a_worker_without_the_package_is_told(cluster, tmp_path, documents, monkeypatch):
    """The class comes from a module that this process has, and the workers do not find."""
    code = tmp_path / "only_here.py"
    code.write_text("from dftserve.targets import on_ray\nclass Worker(on_ray._Worker): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(on_ray, "_Worker", importlib.import_module("only_here").Worker)
    code.unlink()
    with pytest.raises(RuntimeError, match=r"cannot be made: .*only_here.*; install the same"):
        built_on_ray(tmp_path / "ray", documents, lambda _: Certain())


@pytest.mark.long
def test_other_versions_are_refused(cluster, tmp_path, documents, monkeypatch):
    ours = store.versions()
    monkeypatch.setattr(store, "versions", lambda: {**ours, "torch": "1.0"})
    with pytest.raises(RuntimeError, match=r"this process .*'torch': '1.0'.*Install the same"):
        built_on_ray(tmp_path / "ray", documents, lambda _: Certain())


@pytest.mark.long
def test_a_worker_reads_one_shard_at_a_time(cluster, tmp_path, documents):
    """And there are as many of them as are asked for, whether or not there is a GPU for them."""
    running, counts = tmp_path / "running", tmp_path / "counts"
    running.mkdir()
    counts.mkdir()

    def count() -> None:
        mine = running / f"{os.getpid()}-{random.random()}"
        mine.touch()
        (counts / mine.name).write_text(str(len(list(running.iterdir()))))
        mine.unlink()

    one = Cluster(address=None, workers=1, loads_models=True)
    built_on_ray(tmp_path / "ray", documents, lambda _: Certain(count), cluster=one)
    assert {path.read_text() for path in counts.iterdir()} == {"1"}
    assert len({path.name.partition("-")[0] for path in counts.iterdir()}) == 1


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def novels(tmp_path) -> Path:
    return save_novels(tmp_path / "novels")


def test_the_command(cluster, tmp_path, novels, model, monkeypatch):
    """With a shipped recipe; names that the driver's folder makes true are true for the workers."""
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
def test_engines_that_are_none(tmp_path, novels, model, engine):
    result = build(novels, model, tmp_path / "out", "--engine", engine)
    refused(result, "engine: got", "accepted: local, ray, ray://HOST:PORT")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def nobody(monkeypatch, tmp_path) -> int:
    """A port on which nothing listens; and no cluster of this machine is known."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray-tmp"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("how", ["--engine", "RAY_ADDRESS", "ray_current_cluster"])
def test_a_cluster_that_is_gone_is_told_before_anything_is_read(
    tmp_path, novels, model, monkeypatch, nobody, how
):
    engine, address = "ray", f"127.0.0.1:{nobody}"
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


def test_without_ray_nothing_is_read(tmp_path, novels, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = build(novels, model, tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 1
    assert "Error: the engine ray needs Ray: pip install 'dftserve[ray]'." in result.output
    assert not (tmp_path / "out").exists()


def test_a_plan_says_where_it_measured(tmp_path, novels, model):
    result = build(novels, model, tmp_path / "out", "--engine", "ray", "--plan")
    assert result.exit_code == 0, result.output
    assert "Measured on this machine; the Ray cluster is not asked." in result.output
