"""The folder of a run: one process group writes to it, and what goes on in it is what was begun.

    with RunFolder(config) as folder:   # refuses another run's folder, and one that is written to
        folder.check_alike()            # all processes were given this run
        ...
        folder.begin()                  # from here on it is this run's
        folder.check_seen()             # by all processes

run/settings.json     the resolved configuration; `origin`: by how many processes, from which
                      weights and targets
run/lock              locked while the run lasts; holds a random id of this start

Paths may change between two starts: of the model, the targets and the output it is the content that
is compared.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dftserve import atomic, checkpoint, lm, lock
from dftserve.bounded_files import FileError, advised, open_growing, read_json, read_text, shaped_as
from dftserve.checkpoint import RUN_SETTINGS as SETTINGS
from dftserve.digest import digest_of
from dftserve.lm import model_digest
from dftserve.targets.store import MANIFEST, Manifest
from dftserve.train import processes
from dftserve.train.config import LoraConfig, TrainConfig
from dftserve.train.trainer import is_whole, last_checkpoint

LOCK, ORIGIN, WEIGHTS = "lock", "origin", "weights.json"
SEEN_WITHIN_S = 60.0
"""In which a file of one machine is seen by the others: NFS keeps names for so long (acdirmax)."""
LARGEST = 1 << 20
"""Bytes of a file of a run's own."""
PLACES = ("model", "targets", "output")
"""Settings that say where something lies, not what it is."""
TOLD = {"model": "configuration or weights", "targets": "manifest"}
"""What is compared of a folder; of several target stores by `targets[0]` and so on."""
ELSEWHERE = "choose another output, or remove it"


class RunFolder:
    """The first of several processes holds the lock, from entering, or from `begin`, to the end.

    Raises:
        ValueError: on entering, a folder that holds something else than a start of this run, or
            that another training writes to; nothing has been written then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._folder = config, Path(config.output)
        self._closing, self._is_locked = contextlib.ExitStack(), False
        self._start_id = secrets.token_hex(16)

    def __enter__(self) -> "RunFolder":
        with contextlib.ExitStack() as opened:
            # Before the weights are read, which takes long where they are large.
            if (self._folder / LOCK).exists():
                self._lock(opened)
            if self._is_begun():
                self._lock(opened)
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.close()
        self._is_locked = False

    def begin(self) -> None:
        """Make the folder and its settings; the first of several processes does it.

        Raises:
            ValueError: as on entering: another process may have begun in it since.
        """
        if not processes.is_first():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock(self._closing)
        if not self._is_begun():
            content = json.dumps(_settings(self._config), indent=2)
            atomic.write_text(self._folder / SETTINGS, content + "\n")

    def check_alike(self) -> None:
        """Refuse processes that were given another run than the first one.

        Raises:
            ValueError: the same in all of them; names what differs, and where.
        """
        with processes.together():
            mine = _compared(_settings(self._config))
        names = processes.gathered(processes.named())
        first, *others = processes.gathered(mine)
        for name, other in zip(names[1:], others, strict=True):
            _refuse_differing(names[0], first, name, other)

    def check_seen(self) -> None:
        """Refuse processes for which the folder is another than the first one's.

        Raises:
            ValueError: the same in all of them; names the machine.
        """
        names = processes.gathered(processes.named())
        start_id = processes.gathered(self._start_id)[0]
        for name, sees in zip(names, processes.gathered(self._sees(start_id)), strict=True):
            if not sees:
                raise ValueError(
                    f"output: {name} does not see in {self._folder} what {names[0]} wrote there; "
                    "accepted: one folder, on a file system that all machines share."
                )

    def to_go_on_from(self) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint that the run goes on from, and the figures of the candidates for λ that
        were tried: as the first process finds them. Another machine may see an older folder for a
        while.

        Raises:
            ValueError: the same in all processes: what is damaged, or what one does not see.
        """
        with processes.together():
            newest = last_checkpoint(self._folder) if processes.is_first() else None
            tried = (read_object(self._folder / WEIGHTS) or {}) if processes.is_first() else {}
        name, tried = processes.gathered([newest.name if newest else None, tried])[0]
        if name is None:
            return None, tried
        path = self._folder / name
        with processes.together():
            if not processes.is_first() and not _comes(lambda: is_whole(path)):
                checkpoint.verify(path)
        return path, tried

    def store_paths(self) -> list[str]:
        """Where the target stores lay when the run was begun; the same in every process.

        Raises:
            ValueError: the same in all processes: the settings are no longer what a run writes.
        """
        path = self._folder / SETTINGS
        with processes.together():
            found = read_object(path) if processes.is_first() else None
            with shaped_as(path, "what a run writes"):
                mine = [str(each["path"]) for each in _stores(found)] if found else []
        return processes.gathered(mine)[0]

    def _sees(self, start_id: str) -> bool:
        """Whether the lock that the first process holds is this folder's."""
        return _comes(lambda: self._read_start_id() == start_id)

    def _read_start_id(self) -> str | None:
        try:
            return read_text(self._folder / LOCK, within=self._folder, largest=LARGEST)
        except (OSError, ValueError):
            return None

    def _is_begun(self) -> bool:
        """Whether it holds a start of this run; False where it holds nothing."""
        # Looked at first: another process of this run may write the settings meanwhile.
        names = {p.name for p in self._folder.iterdir()} if self._folder.exists() else set()
        found = read_object(self._folder / SETTINGS)
        if found is not None:
            _refuse_another(self._folder, found, _settings(self._config))
            return True
        # A kill may have left what was to become the settings, and the lock.
        if names - {SETTINGS + atomic.PARTIAL, LOCK}:
            raise ValueError(f"{self._folder} is neither empty nor a run; choose another output.")
        return False

    def _lock(self, closing: contextlib.ExitStack) -> None:
        """Take the lock, which is kept until `closing` ends, where it is not held already."""
        if not processes.is_first() or self._is_locked:
            return
        file = closing.enter_context(open_growing(self._folder / LOCK, largest=LARGEST))
        try:
            taken = lock.take(file)
        except OSError as error:
            raise ValueError(
                f"{self._folder} cannot be locked ({error}); accepted: an output on a file system "
                "with locks."
            ) from None
        if not taken:
            raise ValueError(
                f"{self._folder}: another training writes to it; wait for it, or choose another "
                "output."
            )
        file.truncate(0)
        file.write(self._start_id.encode())
        file.flush()
        os.fsync(file.fileno())  # Other machines see what is on the disk of the file server.
        self._is_locked = True


def _comes(is_there: Callable[[], bool]) -> bool:
    """Whether it is there in time: NFS shows other machines' files late."""
    until = time.monotonic() + SEEN_WITHIN_S
    while not is_there():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def read_object(path: Path) -> dict[str, Any] | None:
    """What an earlier start of the run wrote; None where there was none.

    Raises:
        ValueError: it is not what a run writes.
    """
    try:
        content = read_json(path, within=path.parent, largest=LARGEST)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise ValueError(advised(error, ELSEWHERE)) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not what a run writes; {ELSEWHERE}.")
    return content


# ── What a run is ────────────────────────────────────────────────────────────────────────────────


def _settings(config: TrainConfig) -> dict[str, Any]:
    names = _store_names(len(config.stores))
    origin = {
        "processes": processes.count(),
        "model": model_digest(lm.examine(config.model)),
        **{
            name: targets_digest(Path(store.path))
            for name, store in zip(names, config.stores, strict=True)
        },
    }
    return json.loads(json.dumps({**asdict(config), ORIGIN: origin}))


def _store_names(count: int) -> list[str]:
    """What the target stores of a run are called; a list of one is as the store itself."""
    return ["targets"] if count == 1 else [f"targets[{number}]" for number in range(count)]


def targets_digest(store: Path) -> str:
    """BLAKE3 of a target store's manifest, which names that of every shard.

    Raises:
        StoreError: no store that can be read.
    """
    Manifest.read(store)
    return digest_of(store / MANIFEST, within=store)


def _refuse_another(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError where two starts are of other runs; says in what."""
    was, now = (
        {name: value for name, value in _compared(each).items() if not _is_origin(name)}
        for each in (_completed(found), wanted)
    )
    for name in {**now, **was}:
        if was.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds a run whose {name} is {was.get(name)!r}, not {now.get(name)!r}; "
                f"{ELSEWHERE}."
            )
    before, after = found.get(ORIGIN), wanted[ORIGIN]
    if before is None:
        raise ValueError(
            f"{folder} holds a run that was begun by an earlier version, which did not note its "
            "processes, weights and targets; go on with that version, or choose another output."
        )
    if not isinstance(before, Mapping) or before.keys() != after.keys():
        raise ValueError(f"{folder / SETTINGS} is not what a run writes; {ELSEWHERE}.")
    if before["processes"] != after["processes"]:
        raise ValueError(
            f"{folder} holds a run of {before['processes']} processes, not {after['processes']}: "
            "the tokens of a step and the number of steps would be others. Start it with "
            f"torchrun --nproc-per-node={before['processes']}, or {ELSEWHERE}."
        )
    for what, place in _places(wanted).items():
        if before[what] != after[what]:
            raise ValueError(
                f"{folder} holds a run that began with another `{what}` than {place} is now: its "
                f"{_told(what)} differ. Give the one that it began with, or {ELSEWHERE}."
            )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes must have alike, by name; of folders what is in them."""
    own = {name: value for name, value in settings.items() if name not in PLACES}
    stores = _stores(settings)
    weights = {
        f"{name}.weight": store.get("weight")
        for name, store in zip(_store_names(len(stores)), stores, strict=True)
    }
    return _flat({"number of targets": len(stores), **(weights if len(stores) > 1 else {}), **own})


def _is_origin(name: str) -> bool:
    return name.split(".")[0] == ORIGIN


def _stores(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The target stores that settings name, as a run writes them."""
    targets = settings["targets"]
    if not isinstance(targets, list):
        return [{"path": targets}]
    return [each if isinstance(each, Mapping) else {} for each in targets]


def _places(settings: Mapping[str, Any]) -> dict[str, str]:
    """Where what `origin` compares by its content lies, by name."""
    stores = _stores(settings)
    named = zip(_store_names(len(stores)), stores, strict=True)
    return {"model": settings["model"], **{name: store["path"] for name, store in named}}


def _told(what: str) -> str:
    """What is compared of it."""
    return TOLD[what.partition("[")[0]]


def _refuse_differing(
    first_name: str, first: Mapping[str, Any], other_name: str, other: Mapping[str, Any]
) -> None:
    """Raises ValueError where two processes were given other runs; says in what."""
    for name in {**first, **other}:
        ours, theirs = first.get(name), other.get(name)
        if ours == theirs:
            continue
        outer, _, what = name.rpartition(".")
        told = (
            f"{what}: got another one in {other_name} than in {first_name}, its {_told(what)} "
            "differ"
            if outer == ORIGIN
            else f"{name}: got {theirs!r} in {other_name} and {ours!r} in {first_name}"
        )
        raise ValueError(f"{told}; accepted: the same in every process of a run.")


def _completed(found: Mapping[str, Any]) -> dict[str, Any]:
    """With the default of each setting that there was not yet when the run was begun."""
    defaults = TrainConfig(**dict.fromkeys(PLACES, ""), lora=LoraConfig())
    return _laid_over(json.loads(json.dumps(asdict(defaults))), {"lora": None, **found})


def _laid_over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = _laid_over(value, merged[name])
    return merged


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, as settings are named."""
    flat = {}
    for name, value in content.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat
