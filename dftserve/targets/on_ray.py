"""Builds shards with the workers of a Ray cluster; this process writes them.

A worker loads the source and computes one shard at a time. The result is returned through Ray's
object store, some 60 MB for a million tokens. Workers need the package, the models and the files
that the recipe names, but no access to the store's folder. A lost worker is replaced, and its shard
is computed again. A shard depends only on the plan and its documents, so its bytes are the same
whichever worker computes it and however often it is started.
"""

import logging
import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.targets import store
from dftserve.targets.source import Documents, MakeSource, Source
from dftserve.targets.store import Part, Plan

WAIT_SECONDS = 15.0
"""After this time a message says that no worker has started."""
ANSWER_SECONDS = 5.0
"""Time limit for connecting to a cluster's address. Ray itself tries for many minutes."""
LOSSES = 5
"""The build fails when this many workers are lost on the same shard, or in a row while starting."""
STARTING = "a start"
CREATION = "raised in its creation task"
"""In Ray's message if the worker's class cannot be loaded in a worker process."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The cluster and workers to use for a build."""

    address: str | None
    """`ray://HOST:PORT`; None: the cluster given by RAY_ADDRESS or by a `ray start` on this
    machine, else a temporary cluster of this machine alone."""
    workers: int | None
    """None: one per GPU, or one per machine if the cluster has no GPU or the recipe loads no model.
    Each worker has its own copy of everything that the recipe loads and counts."""
    loads_models: bool
    """Whether the recipe loads models."""


def build(
    folder: Path,
    plan: Plan,
    documents: Documents,
    make_source: MakeSource,
    cluster: Cluster,
    say: Say,
) -> Iterator[int]:
    """Write the missing shards; yields the number of tokens of each once it is written.

    Args:
        make_source: makes the source of `plan` in each worker; it is pickled.

    Raises:
        RuntimeError: no Ray, no cluster, workers with other versions, or workers that are lost
            repeatedly.
        ValueError: something that a worker could not read or load.
        OSError: a shard cannot be written.
    """
    missing = []
    for part in store.parts_of(documents):
        if (folder / part.file).exists():
            yield part.tokens
        else:
            missing.append(part)
    if not missing:
        return
    with _connected(cluster.address) as ray, _reporting_lost_connection(cluster.address):
        workers = _Workers.of(cluster, len(missing), plan, ray.put(documents), make_source)
        for part, content in _Queue(missing, workers, say).shards():
            atomic.write_file(folder / part.file, lambda path: path.write_bytes(content))  # noqa: B023
            yield part.tokens


def check(address: str | None) -> None:
    """Check early, before anything is read, that a cluster can be used.

    Args:
        address: as `Cluster.address`.

    Raises:
        RuntimeError: Ray is not installed, or nothing answers at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    named, setting = _named_address(address)
    if named is None and os.environ.get("RAY_ADDRESS") == "auto":
        raise RuntimeError(
            "RAY_ADDRESS is auto, and no cluster was started on this machine (`ray start`); "
            "accepted: its address, or no RAY_ADDRESS, for a cluster of this build alone."
        )
    if named is None:
        return
    host, _, port = named.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"no Ray cluster answers at {named}, from {setting} ({error}); accepted: "
            "--engine ray://HOST:PORT or RAY_ADDRESS of a running one, or neither, for one on this "
            "machine."
        ) from None


def _named_address(address: str | None) -> tuple[str | None, str]:
    """The configured address of a cluster, and the setting it comes from; None: start one."""
    if address is not None:
        return address, "--engine"
    if (named := os.environ.get("RAY_ADDRESS", "")) not in ("", "auto", "local"):
        return named, "RAY_ADDRESS"
    # Written by `ray start`; removed by `ray stop`, but not if Ray is killed.
    left = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if named != "local" and left.is_file():
        return left.read_text().strip(), f"{left}, which `ray stop` removes"
    return None, ""


def _ray() -> Any:
    # A cluster that we start sends no usage statistics.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise RuntimeError("the engine ray needs Ray: pip install 'dftserve[ray]'.") from None
    return ray


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; an existing connection is reused and left open."""
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    check(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The error contains the same information.
            ray.init(
                address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
    except Exception as error:  # noqa: BLE001 - Ray raises what its transports raise, of any kind
        where = _named_address(address)[0] or "on this machine"
        raise RuntimeError(
            f"the Ray cluster {where} cannot be joined or started ({_first_line(error)}); "
            "accepted: one that runs the same Ray; if it requires a token, set "
            "RAY_AUTH_MODE=token and provide that token."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _reporting_lost_connection(address: str | None) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:  # Never raised by disk access.
        raise RuntimeError(
            f"the Ray cluster at {address or 'this machine'} is gone ({_first_line(error)}); the "
            "same command continues with what is missing."
        ) from None


class _Worker:
    """Runs in a process of the cluster. The source is loaded in `start`, because the message of an
    error in `__init__` would not reach the caller."""

    def __init__(self) -> None:
        self._source: Source | None = None

    def start(
        self, documents: Documents, plan: Plan, make_source: MakeSource, cwd: Path
    ) -> dict[str, str]:
        """Load the source; returns the versions of the packages it uses."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if cwd.is_dir():
            os.chdir(cwd)  # So that relative paths in a recipe resolve as for the command.
        self._documents, self._plan = documents, plan
        self._source = make_source(documents)
        difference = store.difference(self._source.describe(), plan.source)
        if difference:
            raise ValueError(
                f"its source differs from the command's: {difference}. Give its machine the same "
                "models and files."
            )
        return store.versions()

    def shard(self, part: Part) -> bytes:
        assert self._source is not None, "start comes first"
        return store.shard_bytes(self._plan, self._source, part, self._documents)


@dataclass(frozen=True)
class _Workers:
    """The number of workers, and how to start one."""

    number: int
    gpus: int
    """Per worker."""
    arguments: tuple
    """Arguments of `_Worker.start`."""

    @classmethod
    def of(
        cls, cluster: Cluster, shards: int, plan: Plan, documents: Any, make_source: MakeSource
    ) -> "_Workers":
        """As many as `Cluster.workers` specifies, but no more than there are shards."""
        import ray

        machines = [each for each in ray.nodes() if each["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0)) if cluster.loads_models else 0
        number = cluster.workers or gpus or max(len(machines), 1)
        arguments = (documents, plan, make_source, Path.cwd())
        return cls(min(number, shards), min(gpus, 1), arguments)

    def start(self) -> tuple[Any, Any]:
        """A worker, and the future of its `start`."""
        import ray

        remote_class: Any = ray.remote(_Worker).options(num_cpus=1, num_gpus=self.gpus)
        worker = remote_class.remote()
        return worker, worker.start.remote(*self.arguments)

    def __str__(self) -> str:
        return f"{self.number} of {'1 GPU and ' if self.gpus else ''}1 CPU each"


class _Queue:
    """The shards still to compute, and the state of each worker."""

    def __init__(self, missing: Sequence[Part], workers: _Workers, say: Say) -> None:
        self._waiting = deque(missing)
        self._workers, self._say = workers, say
        self._starting: dict[Any, Any] = {}
        """Workers by the future of their `start`."""
        self._reading: dict[Any, tuple[Any, Part]] = {}
        """Workers and their shards by the future of `shard`. One shard per worker bounds the memory
        for results."""
        self._losses: Counter[str] = Counter()

    def shards(self) -> Iterator[tuple[Part, bytes]]:
        """Each shard with its content, in order of completion.

        Raises:
            As `build`.
        """
        import ray

        for _ in range(self._workers.number):
            self._start_worker()
        while self._waiting or self._reading:
            ready, _ = ray.wait([*self._starting, *self._reading], timeout=WAIT_SECONDS)
            if not ready and not self._reading:
                self._say(f"  no worker is ready yet ({self._workers}); {_free_resources()}")
            for each in ready:
                if each in self._starting:
                    self._take_started(each)
                elif (read := self._take_read(each)) is not None:
                    yield read

    def _start_worker(self) -> None:
        worker, future = self._workers.start()
        self._starting[future] = worker

    def _take_started(self, future: Any) -> None:
        worker = self._starting.pop(future)
        versions = self._result(future, STARTING)
        if versions is None:
            self._start_worker()
            return
        if versions != (ours := store.versions()):
            raise RuntimeError(
                f"a worker has the versions {versions}, this process {ours}: their shards may "
                "differ. Install the same on all machines of the cluster."
            )
        del self._losses[STARTING]
        self._assign(worker)

    def _take_read(self, future: Any) -> tuple[Part, bytes] | None:
        worker, part = self._reading.pop(future)
        content = self._result(future, part.file)
        if content is None:
            self._waiting.appendleft(part)
            self._start_worker()
            return None
        self._assign(worker)  # It computes the next one while this one is written.
        return part, content

    def _assign(self, worker: Any) -> None:
        """Give a worker its next shard; without one it is dereferenced, which ends it."""
        if self._waiting:
            part = self._waiting.popleft()
            self._reading[worker.shard.remote(part)] = worker, part

    def _result(self, future: Any, task: str) -> Any:
        """A worker's result; None if the worker was lost.

        Raises:
            RuntimeError: workers were lost too often.
            ValueError, RuntimeError: the error that the worker raised.
        """
        import ray
        from ray.exceptions import ActorDiedError, RayError, RayTaskError

        try:
            return ray.get(future)
        except RayTaskError as error:
            kind = ValueError if isinstance(error.cause, ValueError) else RuntimeError
            raise kind(f"a worker of the Ray cluster: {_line(error.cause)}") from None
        except RayError as error:
            if isinstance(error, ActorDiedError) and CREATION in str(error):
                raise RuntimeError(
                    f"a worker of the Ray cluster cannot be made: {_last_line(error)}; install the "
                    "same dftserve on all of its machines."
                ) from None
            self._losses[task] += 1
            if self._losses[task] >= LOSSES:
                raise RuntimeError(
                    f"{task}: its worker was lost {LOSSES} times, last by: {_first_line(error)}; "
                    "if memory ran out, use fewer workers (--processes). The same command "
                    "continues with what is missing."
                ) from None
            self._say(f"  {task}: its worker was lost ({type(error).__name__}); another takes over")
            return None


def _free_resources() -> str:
    import ray

    free = ray.available_resources()
    cpus, gpus = (free.get(kind, 0) for kind in ("CPU", "GPU"))
    return f"free, not counting loading workers: {cpus:g} CPUs, {gpus:g} GPUs"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:400]


def _first_line(error: object) -> str:
    """The first line of Ray's message, before any traceback."""
    message = str(error).partition("Traceback")[0].strip()
    return _line(message.partition("\n")[0]).rstrip(".") or type(error).__name__


def _last_line(error: object) -> str:
    """The last line of a message that contains a traceback: the error that was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _line(lines[-1] if lines else type(error).__name__)
