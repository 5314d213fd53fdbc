"""Workers and drivers that are killed again and again, at random moments: the same store.

A cluster outlives its drivers, each of which is a process of its own.
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
from tests.ray.test_targets_on_ray import Certain, bytes_of, finished, planned, some_documents

pytestmark = pytest.mark.long
KILLS = 20
"""Of drivers, and of workers, at least."""
PATIENCE = 600.0
"""Seconds for what must come: a cluster's start, a driver that nobody kills."""
SHARD_TOKENS, DOCUMENTS = 300, 120
WORKERS = 3
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path.cwd()),
    # A head takes a token where one lies in the home; a driver is to be told that it does.
    "RAY_AUTH_MODE": "token",
}
DRIVER = """
    import sys, time
    from pathlib import Path
    from dftserve.targets import on_ray, store
    from tests.ray.test_lost_on_ray import DOCUMENTS, SHARD_TOKENS, WORKERS
    from tests.ray.test_targets_on_ray import Certain, planned, some_documents
    store.SHARD_TOKENS = SHARD_TOKENS
    folder, documents = Path(sys.argv[1]), some_documents(DOCUMENTS)
    plan = planned(documents)
    store.begin(folder, plan)
    cluster = on_ray.Cluster(address=None, workers=WORKERS, loads_models=False)
    slow = lambda _: Certain(lambda: time.sleep(0.2))
    for _ in on_ray.build(folder, plan, documents, slow, cluster, print):
        pass
"""


@pytest.fixture
def head(tmp_path) -> Iterator[tuple[psutil.Process, str]]:
    """A cluster that `ray start` made: its process, and its address."""
    ray = Path(sys.executable).with_name("ray")
    options = ["--head", "--block", "--port=0", f"--num-cpus={WORKERS}", "--disable-usage-stats"]
    options += ["--include-dashboard=false", f"--object-store-memory={200 << 20}"]
    log = tmp_path / "head.log"
    environment = {**os.environ, **ENVIRONMENT}
    with log.open("w") as file:
        process = subprocess.Popen([ray, "start", *options], env=environment, stdout=file)
    try:
        waited(lambda: "ray start --address=" in log.read_text())
        told = log.read_text().split("ray start --address=")[1]
        yield psutil.Process(process.pid), told.split("'")[1]
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(timeout=PATIENCE)
        for one in family:
            if one.is_running():
                one.kill()


def waited(until: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def driver(script: Path, folder: Path, address: str) -> subprocess.Popen:
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": address}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)


def workers(head: psutil.Process) -> list[psutil.Process]:
    """Processes of the cluster that hold a source, or are about to."""
    found = []
    for one in head.children(recursive=True):
        try:
            if "ray::_Worker" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue  # It has ended meanwhile.
    return found


def test_killed_drivers_and_workers_leave_the_store_as_it_would_be(head, tmp_path, monkeypatch):
    cluster, address = head
    monkeypatch.setattr(store, "SHARD_TOKENS", SHARD_TOKENS)
    documents, chosen = some_documents(DOCUMENTS), random.Random(0)
    store.write(tmp_path / "local", planned(documents), Certain(), documents)
    script, folder = tmp_path / "driver.py", tmp_path / "ray"
    script.write_text(textwrap.dedent(DRIVER))
    killed = {"drivers": 0, "workers": 0}
    while min(killed.values()) < KILLS:
        if len(list(folder.glob("*.safetensors"))) == len(store.parts_of(documents)):
            shutil.rmtree(folder)  # All is written: from the beginning.
        process = driver(script, folder, address)
        waited(lambda: workers(cluster) or process.poll() is not None)  # noqa: B023
        for _ in range(chosen.randint(1, 3)):
            time.sleep(chosen.uniform(0, 4))
            if found := workers(cluster):
                chosen.choice(found).kill()
                killed["workers"] += 1
        time.sleep(chosen.uniform(0, 4))
        if process.poll() is None:
            process.kill()
            killed["drivers"] += 1
        assert process.wait() in (0, -signal.SIGKILL)
        waited(lambda: not workers(cluster))
    print(killed)
    assert driver(script, folder, address).wait(timeout=PATIENCE) == 0
    assert finished(folder, documents) == bytes_of(tmp_path / "local")
