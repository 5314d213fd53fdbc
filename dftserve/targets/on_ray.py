"""The shards of a build read by workers of a Ray cluster, and written by this process.

A worker holds the source and reads one shard at a time. What it makes comes back through Ray's
object store, some 60 MB for a million tokens: the workers need the package, the models and what the
recipe names, and no access to the store's folder. A worker that is lost is replaced, and its shard
read again. A shard depends on the plan and its documents alone: who reads it, and how often it is
begun, changes no byte.
"""

import logging
import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve import atomic
from dftserve.targets import store
from dftserve.targets.document import Document
from dftserve.targets.source import Source
from dftserve.targets.store import Part, Plan

WAIT_SECONDS = 15.0
"""Until it is said that no worker has started."""
ANSWER_SECONDS = 5.0
"""In which the address of a cluster is to take a connection. Ray itself tries for many minutes."""
LOSSES = 5
"""The loss of a worker that ends the build: of workers that read the same shard, or that are lost
before they are ready, one after the other."""
STARTING = "a start"
CREATION = "raised in its creation task"
"""How Ray's words begin where a class cannot be loaded in a worker."""

Documents = Mapping[str, Sequence[Document]]
MakeSource = Callable[[Documents], Source]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which workers a build asks for."""

    address: str | None
    """`ray://HOST:PORT`; None: what RAY_ADDRESS or a `ray start` on this machine says, else a
    cluster of this machine alone, for the time of the build."""
    workers: int | None
    """None: one for each GPU, or, where the cluster has none or the recipe loads no model, for each
    machine: each worker has its own copy of all that the recipe loads and counts."""
    loads_models: bool
    """Whether the recipe does."""


def build(
    folder: Path,
    plan: Plan,
    documents: Documents,
    make_source: MakeSource,
    cluster: Cluster,
    say: Say,
) -> Iterator[int]:
    """Write the missing shards; yields the tokens of each when it is written.

    Args:
        make_source: makes the source of `plan`, in each worker; sent to them by pickle.

    Raises:
        RuntimeError: no Ray, no cluster, workers of other versions, or workers that are lost again
            and again.
        ValueError: what a worker could not read or load.
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
    with _connected(cluster.address) as ray, _while_it_lasts(cluster.address):
        workers = _Workers.of(cluster, len(missing), plan, ray.put(documents), make_source)
        for part, content in _Queue(missing, workers, say).shards():
            atomic.write_file(folder / part.file, lambda path: path.write_bytes(content))  # noqa: B023
            yield part.tokens


def check(address: str | None) -> None:
    """Refuse, before anything is read, what could not be built on.

    Args:
        address: as `Cluster.address`.

    Raises:
        RuntimeError: there is no Ray, or nothing at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    named, of = _named_address(address)
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
            f"no Ray cluster answers at {named}, from {of} ({error}); accepted: --engine "
            "ray://HOST:PORT or RAY_ADDRESS of one that runs, or neither, for one on this machine."
        ) from None


def _named_address(address: str | None) -> tuple[str | None, str]:
    """Where a cluster is said to be, and by what; None: it is to be started."""
    if address is not None:
        return address, "--engine"
    if (named := os.environ.get("RAY_ADDRESS", "")) not in ("", "auto", "local"):
        return named, "RAY_ADDRESS"
    # What `ray start` leaves; `ray stop` removes it, and a kill does not.
    left = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    if named != "local" and left.is_file():
        return left.read_text().strip(), f"{left}, which `ray stop` removes"
    return None, ""


def _ray() -> Any:
    # A cluster that we start tells nobody that it is in use.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise RuntimeError("the engine ray needs Ray: pip install 'dftserve[ray]'.") from None
    return ray


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that the caller has made is used and kept."""
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    check(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What they say, the error says.
            ray.init(
                address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
    except Exception as error:  # noqa: BLE001 - Ray raises what its transports raise, of any kind
        asked = _named_address(address)[0] or "on this machine"
        raise RuntimeError(
            f"the Ray cluster {asked} cannot be joined or started ({_first_line(error)}); "
            "accepted: one that runs the same Ray; where it asks for a token, set "
            "RAY_AUTH_MODE=token and have that token."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _while_it_lasts(address: str | None) -> Iterator[None]:
    try:
        yield
    except ConnectionError as error:  # Not from a disk.
        raise RuntimeError(
            f"the Ray cluster at {address or 'this machine'} is gone ({_first_line(error)}); the "
            "same command goes on with what is missing."
        ) from None


class _Worker:
    """In a process of the cluster. An error in `start` reaches the command with its message; one in
    `__init__` would not."""

    def __init__(self) -> None:
        self._source: Source | None = None

    def start(
        self, documents: Documents, plan: Plan, make_source: MakeSource, cwd: Path
    ) -> dict[str, str]:
        """Load what the source needs; the versions by which it reads."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if cwd.is_dir():
            os.chdir(cwd)  # Relative names in a recipe mean what they mean to the command.
        self._documents, self._plan = documents, plan
        self._source = make_source(documents)
        difference = store.difference(self._source.describe(), plan.source)
        if difference:
            raise ValueError(
                f"its source is another than the command's: {difference}. Give its machine the "
                "same models and files."
            )
        return store.versions()

    def shard(self, part: Part) -> bytes:
        assert self._source is not None, "start comes first"
        return store.shard_bytes(self._plan, self._source, part, self._documents)


@dataclass(frozen=True)
class _Workers:
    """How many there are, and how one is made."""

    number: int
    gpus: int
    """Of each."""
    given: tuple
    """To `_Worker.start`."""

    @classmethod
    def of(
        cls, cluster: Cluster, shards: int, plan: Plan, documents: Any, make_source: MakeSource
    ) -> "_Workers":
        """As many as asked for, or as `Cluster.workers` says; no more than shards."""
        import ray

        machines = [each for each in ray.nodes() if each["Alive"]]
        gpus = int(ray.cluster_resources().get("GPU", 0)) if cluster.loads_models else 0
        number = cluster.workers or gpus or max(len(machines), 1)
        given = (documents, plan, make_source, Path.cwd())
        return cls(min(number, shards), min(gpus, 1), given)

    def start(self) -> tuple[Any, Any]:
        """A worker, and what its `start` will give."""
        import ray

        made: Any = ray.remote(_Worker).options(num_cpus=1, num_gpus=self.gpus)
        worker = made.remote()
        return worker, worker.start.remote(*self.given)

    def __str__(self) -> str:
        return f"{self.number} of {'1 GPU and ' if self.gpus else ''}1 CPU each"


class _Queue:
    """Shards that are still to be read, and what each worker does."""

    def __init__(self, missing: Sequence[Part], workers: _Workers, say: Say) -> None:
        self._waiting = deque(missing)
        self._workers, self._say = workers, say
        self._starting: dict[Any, Any] = {}
        """Workers, by what `start` will give."""
        self._reading: dict[Any, tuple[Any, Part]] = {}
        """Workers and their shards, by what `shard` will give: one each, so that no more is held
        than is being read."""
        self._losses: Counter[str] = Counter()

    def shards(self) -> Iterator[tuple[Part, bytes]]:
        """Each with its content, in the order in which they are read.

        Raises:
            As `build`.
        """
        import ray

        for _ in range(self._workers.number):
            self._start_worker()
        while self._waiting or self._reading:
            given, _ = ray.wait([*self._starting, *self._reading], timeout=WAIT_SECONDS)
            if not given and not self._reading:
                self._say(f"  no worker is ready yet, of {self._workers}; {_free()}")
            for each in given:
                if each in self._starting:
                    self._take_started(each)
                elif (read := self._take_read(each)) is not None:
                    yield read

    def _start_worker(self) -> None:
        worker, given = self._workers.start()
        self._starting[given] = worker

    def _take_started(self, given: Any) -> None:
        worker = self._starting.pop(given)
        versions = self._result(given, STARTING)
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

    def _take_read(self, given: Any) -> tuple[Part, bytes] | None:
        worker, part = self._reading.pop(given)
        content = self._result(given, part.file)
        if content is None:
            self._waiting.appendleft(part)
            self._start_worker()
            return None
        self._assign(worker)  # It reads the next one while this one is written.
        return part, content

    def _assign(self, worker: Any) -> None:
        """A worker for which nothing is left is let go, and so ends."""
        if self._waiting:
            part = self._waiting.popleft()
            self._reading[worker.shard.remote(part)] = worker, part

    def _result(self, given: Any, of: str) -> Any:
        """What a worker gave; None where the worker was lost.

        Raises:
            RuntimeError: lost too often.
            ValueError, RuntimeError: what the worker raised.
        """
        import ray
        from ray.exceptions import ActorDiedError, RayError, RayTaskError

        try:
            return ray.get(given)
        except RayTaskError as error:
            kind = ValueError if isinstance(error.cause, ValueError) else RuntimeError
            raise kind(f"a worker of the Ray cluster: {_line(error.cause)}") from None
        except RayError as error:
            if isinstance(error, ActorDiedError) and CREATION in str(error):
                raise RuntimeError(
                    f"a worker of the Ray cluster cannot be made: {_last_line(error)}; install the "
                    "same dftserve on all of its machines."
                ) from None
            self._losses[of] += 1
            if self._losses[of] >= LOSSES:
                raise RuntimeError(
                    f"{of}: its worker was lost {LOSSES} times, last by: {_first_line(error)}; "
                    "where memory was short, ask for fewer workers (--processes). The same command "
                    "goes on with what is missing."
                ) from None
            self._say(f"  {of}: its worker was lost ({type(error).__name__}); another takes over")
            return None


def _free() -> str:
    import ray

    free = ray.available_resources()
    cpus, gpus = (free.get(kind, 0) for kind in ("CPU", "GPU"))
    return f"free beside what those that load hold: {cpus:g} CPUs, {gpus:g} GPUs"


def _line(error: object) -> str:
    return " ".join(str(error).split())[:400]


def _first_line(error: object) -> str:
    """What Ray says before it shows where."""
    said = str(error).partition("Traceback")[0].strip()
    return _line(said.partition("\n")[0]).rstrip(".") or type(error).__name__


def _last_line(error: object) -> str:
    """Of an error with a traceback in its text: what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _line(lines[-1] if lines else type(error).__name__)
