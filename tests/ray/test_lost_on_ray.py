"""Workers and drivers that are killed repeatedly at random times leave the same store.

The cluster outlives its drivers, each of which is a separate process.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dftserve.targets import store
from tests.ray.test_targets_on_ray import (
    PredictableSource,
    bytes_of,
    finish_store,
    make_plan,
    some_documents,
)

pytestmark = pytest.mark.long
KILLS = 20
"""The least number of kills of drivers, and of workers."""
PATIENCE = 600.0
"""Timeout in seconds for the start of a cluster or a driver that is not killed."""
SHARD_TOKENS, DOCUMENTS = 300, 120
WORKERS = 3
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path.cwd()),
    # A head uses a token in the home directory by itself; a driver needs this setting.
    "RAY_AUTH_MODE": "token",
}
DRIVER = """
    import sys, time
    from pathlib import Path
    from dftserve.targets import on_ray, store
    from tests.ray.test_lost_on_ray import DOCUMENTS, SHARD_TOKENS, WORKERS
    from tests.ray.test_targets_on_ray import PredictableSource, make_plan, some_documents
    store.SHARD_TOKENS = SHARD_TOKENS
    folder, documents = Path(sys.argv[1]), some_documents(DOCUMENTS)
    plan = make_plan(documents)
    store.begin(folder, plan)
    cluster = on_ray.Cluster(address=None, workers=WORKERS, loads_models=False)
    slow = lambda _: PredictableSource(lambda: time.sleep(0.2))
    for _ in on_ray.build(folder, plan, documents, slow, cluster, print):
        pass
"""


@pytest.fixture
def head(tmp_path) -> Iterator[tuple[psutil.Process, str]]:
    """The process and the address of a cluster that `ray start` has started."""
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--port=0", f"--num-cpus={WORKERS}", "--disable-usage-stats"]
    options += ["--include-dashboard=false", f"--object-store-memory={200 << 20}"]
    log = tmp_path / "head.log"
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("w") as file:
        process = subprocess.Popen([ray, "start", *options], env=environment, stdout=file)
    try:
        wait_for(lambda: "ray start --address=" in log.read_text())
        output = log.read_text().split("ray start --address=")[1]
        yield psutil.Process(process.pid), output.split("'")[1]
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=PATIENCE)
        for child in children:
            if child.is_running():
                child.kill()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def driver(script: Path, folder: Path, address: str) -> subprocess.Popen:
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)


def worker_processes(head: psutil.Process) -> list[psutil.Process]:
    """Processes of the cluster that have a source or are creating one."""
    workers = []
    for process in head.children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(process.cmdline()):
                workers.append(process)
        except psutil.Error:
            continue  # It has ended in the meantime.
    return workers


def test_the_store_is_the_same_after_kills_of_drivers_and_workers(head, tmp_path, monkeypatch):
    cluster, address = head
    monkeypatch.setattr(store, "SHARD_TOKENS", SHARD_TOKENS)
    documents, source = some_documents(DOCUMENTS), random.Random(0)
    store.write(tmp_path / "local", make_plan(documents), PredictableSource(), documents)
    script, folder = tmp_path / "driver.py", tmp_path / "ray"
    script.write_text(textwrap.dedent(DRIVER))
    killed = {"drivers": 0, "workers": 0}
    while min(killed.values()) < KILLS:
        if len(list(folder.glob("*.safetensors"))) == len(store.parts_of(documents)):
            shutil.rmtree(folder)  # The store is complete: start again.
        process = driver(script, folder, address)
        wait_for(lambda: worker_processes(cluster) or process.poll() is not None)  # noqa: B023
        for _ in range(source.randint(1, 3)):
            time.sleep(source.uniform(0, 4))
            if workers := worker_processes(cluster):
                source.choice(workers).kill()
                killed["workers"] += 1
        time.sleep(source.uniform(0, 4))
        if process.poll() is None:
            process.kill()
            killed["drivers"] += 1
        assert process.wait() in (0, -signal.SIGKILL)
        wait_for(lambda: not worker_processes(cluster))
    print(killed)
    assert driver(script, folder, address).wait(timeout=PATIENCE) == 0
    assert finish_store(folder, documents) == bytes_of(tmp_path / "local")
