"""The folder of a run: only one process group writes to it, and only the same run resumes in it.

    with RunFolder(config) as folder:   # refuses a folder of another run, or of a running one
        folder.check_same_run()         # all processes have the same configuration and inputs
        ...
        folder.begin()                  # claims the folder for this run
        folder.check_seen()             # all processes see the same folder

run/settings.json     the resolved configuration; `origin`: number of processes, and digests of the
                      model and the targets
run/lock              locked while the run lasts; contains a random id of this start

Paths may change between two starts: the model and the targets are compared by content.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dftserve import atomic, checkpoint, lock, pretrained
from dftserve.bounded_files import (
    FileError,
    open_growing,
    read_json,
    read_text,
    shaped_as,
    with_advice,
)
from dftserve.checkpoint import RUN_SETTINGS as SETTINGS
from dftserve.digest import digest_of
from dftserve.pretrained import model_digest
from dftserve.targets.store import MANIFEST, Manifest
from dftserve.train import processes
from dftserve.train.config import LoraConfig, TrainConfig
from dftserve.train.trainer import is_whole, last_checkpoint

LOCK, ORIGIN, WEIGHTS = "lock", "origin", "weights.json"
SEEN_WITHIN_S = 60.0
"""Time for a file of one machine to appear on the others: NFS caches names this long (acdirmax)."""
LARGEST = 1 << 20
"""Maximal bytes of a file that a run writes for itself."""
PATHS = ("model", "targets", "output")
"""Settings that are paths; their values may change between two starts."""
COMPARED_CONTENT = {"model": "configuration or weights", "targets": "manifest"}
"""The content of a folder that is compared; several target stores are `targets[0]` and so on."""
ELSEWHERE = "choose another output, or remove it"


class RunFolder:
    """The first of several processes holds the lock: from entering if the folder exists, else from
    `begin`, to the end.

    Raises:
        ValueError: on entering, the folder contains something other than this run, or another
            training writes to it; nothing has been written then.
        OSError: likewise, if the folder cannot be made or written to.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._folder = config, Path(config.output)
        self._closing, self._is_locked = contextlib.ExitStack(), False
        self._start_id = secrets.token_hex(16)

    def __enter__(self) -> "RunFolder":
        if processes.is_first():
            atomic.check_writable(self._folder)
        with contextlib.ExitStack() as opened:
            # First, because reading large weights takes long.
            if (self._folder / LOCK).exists():
                self._lock(opened)
            if self._is_begun():
                self._lock(opened)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        self._is_locked = False

    def begin(self) -> None:
        """Create the folder and its settings, in the first of several processes.

        Raises:
            ValueError: as on entering, since another run may have claimed the folder meanwhile.
        """
        if not processes.is_first():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock(self._closing)
        if not self._is_begun():
            content = json.dumps(_settings(self._config), indent=2)
            atomic.write_text(self._folder / SETTINGS, content + "\n")

    def check_same_run(self) -> None:
        """Refuse processes whose run differs from that of the first one.

        Raises:
            ValueError: the same in all processes; names the difference and the process.
        """
        with processes.together():
            mine = _compared(_settings(self._config))
        names = processes.gather(processes.own_name())
        first, *others = processes.gather(mine)
        for name, other in zip(names[1:], others, strict=True):
            _refuse_differing(names[0], first, name, other)

    def check_seen(self) -> None:
        """Refuse processes that see a different folder than the first one.

        Raises:
            ValueError: the same in all processes; names the machine.
        """
        names = processes.gather(processes.own_name())
        start_id = processes.gather(self._start_id)[0]
        for name, sees in zip(names, processes.gather(self._sees(start_id)), strict=True):
            if not sees:
                raise ValueError(
                    f"output: {name} does not see in {self._folder} what {names[0]} wrote there; "
                    "accepted: one folder, on a file system that all machines share."
                )

    def resume_state(self) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to resume from, and the results of the candidates for λ tried so far, as
        the first process finds them: another machine may see an older folder for a while.

        Raises:
            ValueError: the same in all processes; names what is damaged, or not visible to one.
        """
        with processes.together():
            newest = last_checkpoint(self._folder) if processes.is_first() else None
            tried = (read_object(self._folder / WEIGHTS) or {}) if processes.is_first() else {}
        name, tried = processes.gather([newest.name if newest else None, tried])[0]
        if name is None:
            return None, tried
        path = self._folder / name
        with processes.together():
            if not processes.is_first() and not _appears(lambda: is_whole(path)):
                checkpoint.verify(path)
        return path, tried

    def store_paths(self) -> list[str]:
        """The paths of the target stores when the run was begun; the same in every process.

        Raises:
            ValueError: the same in all processes; the settings file is not one that a run writes.
        """
        path = self._folder / SETTINGS
        with processes.together():
            written = read_object(path) if processes.is_first() else None
            with shaped_as(path, "what a run writes"):
                mine = [str(each["path"]) for each in _stores(written)] if written else []
        return processes.gather(mine)[0]

    def _sees(self, start_id: str) -> bool:
        """Whether this process sees the lock file of the first process."""
        return _appears(lambda: self._read_start_id() == start_id)

    def _read_start_id(self) -> str | None:
        try:
            return read_text(self._folder / LOCK, within=self._folder, largest=LARGEST)
        except (OSError, ValueError):
            return None

    def _is_begun(self) -> bool:
        """Whether the folder contains this run; False if it is empty."""
        # Before reading: another process of this run may write the settings meanwhile. A killed
        # process may have left a partial settings file, and the lock.
        is_empty = atomic.has_only(self._folder, {SETTINGS + atomic.PARTIAL, LOCK})
        written = read_object(self._folder / SETTINGS)
        if written is not None:
            _refuse_another(self._folder, written, _settings(self._config))
            return True
        if not is_empty:
            raise ValueError(f"{self._folder} is neither empty nor a run; choose another output.")
        return False

    def _lock(self, closing: contextlib.ExitStack) -> None:
        """Take the lock unless it is already held; it is released when `closing` ends."""
        if not processes.is_first() or self._is_locked:
            return
        file = closing.enter_context(open_growing(self._folder / LOCK, largest=LARGEST))
        lock.take_or_refuse(file, self._folder, writer="training", output="output")
        file.truncate(0)
        file.write(self._start_id.encode())
        file.flush()
        os.fsync(file.fileno())  # Other machines see what is on the disk of the file server.
        self._is_locked = True


def _appears(is_visible: Callable[[], bool]) -> bool:
    """Wait until it is visible; False after a timeout. NFS shows other machines' files late."""
    until = time.monotonic() + SEEN_WITHIN_S
    while not is_visible():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object that an earlier start of the run wrote; None if there is no such file.

    Raises:
        ValueError: it is not a file that a run writes.
    """
    try:
        content = read_json(path, within=path.parent, largest=LARGEST)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise ValueError(with_advice(error, ELSEWHERE)) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what a run writes; {ELSEWHERE}.")
    return content


# ── Comparing runs ───────────────────────────────────────────────────────────────────────────────


def _settings(config: TrainConfig) -> dict[str, Any]:
    names = _store_names(len(config.stores))
    origin = {
        "processes": processes.count(),
        "model": model_digest(pretrained.examine(config.model)),
        **{
            name: targets_digest(Path(store.path))
            for name, store in zip(names, config.stores, strict=True)
        },
    }
    return json.loads(json.dumps({**asdict(config), ORIGIN: origin}))


def _store_names(count: int) -> list[str]:
    """Names of the target stores of a run; a list of one is named like a single store."""
    return ["targets"] if count == 1 else [f"targets[{number}]" for number in range(count)]


def targets_digest(store: Path) -> str:
    """BLAKE3 of a target store's manifest, which contains the digest of every shard.

    Raises:
        StoreError: not a readable store.
    """
    Manifest.read(store)
    return digest_of(store / MANIFEST, within=store)


def _refuse_another(folder: Path, earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if the two settings are of different runs; names the difference."""
    was, now = (
        {name: value for name, value in _compared(each).items() if not _is_origin(name)}
        for each in (_completed(earlier), wanted)
    )
    for name in {**now, **was}:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds a run whose {name} is {was.get(name)!r}, not {now.get(name)!r}; "
                f"{ELSEWHERE}."
            )
    before, after = earlier.get(ORIGIN), wanted[ORIGIN]
    if not isinstance(before, Mapping) or before.keys() != after.keys():
        raise ValueError(f"{folder / SETTINGS} is not what a run writes; {ELSEWHERE}.")
    if before["processes"] != after["processes"]:
        raise ValueError(
            f"{folder} holds a run of {before['processes']} processes, not {after['processes']}: "
            "the tokens of a step and the number of steps would change. Start it with "
            f"torchrun --nproc-per-node={before['processes']}, or {ELSEWHERE}."
        )
    for what, path in _paths(wanted).items():
        if before[what] != after[what]:
            raise ValueError(
                f"{folder} holds a run that began with another `{what}` than {path} is now: its "
                f"{_compared_content(what)} differ. Give the one that it began with, or "
                f"{ELSEWHERE}."
            )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that must be equal in all processes, by name; folders by their content."""
    own = {name: value for name, value in settings.items() if name not in PATHS}
    stores = _stores(settings)
    weights = {
        f"{name}.weight": store.get("weight")
        for name, store in zip(_store_names(len(stores)), stores, strict=True)
    }
    return _flat({"number of targets": len(stores), **(weights if len(stores) > 1 else {}), **own})


def _is_origin(name: str) -> bool:
    return name.split(".")[0] == ORIGIN


def _stores(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The target stores in settings as a run writes them."""
    targets = settings["targets"]
    if not isinstance(targets, list):
        return [{"path": targets}]
    return [each if isinstance(each, Mapping) else {} for each in targets]


def _paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """The paths of the folders that `origin` compares by content, by name."""
    stores = _stores(settings)
    named = zip(_store_names(len(stores)), stores, strict=True)
    return {"model": settings["model"], **{name: store["path"] for name, store in named}}


def _compared_content(what: str) -> str:
    return COMPARED_CONTENT[what.partition("[")[0]]


def _refuse_differing(
    first_name: str, first: Mapping[str, Any], other_name: str, other: Mapping[str, Any]
) -> None:
    """Raises ValueError if two processes have different runs; names the difference."""
    for name in {**first, **other}:
        ours, theirs = first.get(name), other.get(name)
        if ours == theirs:
            continue
        outer, _, what = name.rpartition(".")
        problem = (
            f"{what}: got another one in {other_name} than in {first_name}, its "
            f"{_compared_content(what)} differ"
            if outer == ORIGIN
            else f"{name}: got {theirs!r} in {other_name} and {ours!r} in {first_name}"
        )
        raise ValueError(f"{problem}; accepted: the same in every process of a run.")


def _completed(written: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults for those that did not exist yet when the run was begun."""
    defaults = TrainConfig(**dict.fromkeys(PATHS, ""), lora=LoraConfig())
    return _merged(json.loads(json.dumps(asdict(defaults))), {"lora": None, **written})


def _merged(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **settings}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = _merged(value, merged[name])
    return merged


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, the names used by `--set`."""
    flat = {}
    for name, value in content.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat
