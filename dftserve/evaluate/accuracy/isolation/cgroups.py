"""A control group for one program: what all of its processes use together, memory of the kernel's
that is theirs included.

    with group(memory=512 << 20, processes=16) as counted:
        if counted is not None:
            counted.add(process.pid)

Limits of a process do not see what processes share or leave in the kernel. A control group does,
where we may make one: as root with cgroup v1, as root or in a delegated part of the tree with v2.
Nothing of the tree is changed but for a folder of our own below the one that we are in, which is
removed afterwards; what a kill left of one is removed by the next.

Linux only. Standard library only.
"""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PREFIX = "dftserve-"
CONTROLLERS = ("memory", "pids")
TRIES, PAUSE_SECONDS = 100, 0.01
"""To remove a group: the last of its processes may still be on their way out."""


@dataclass(frozen=True)
class Place:
    """A folder in which groups may be made for a controller."""

    folder: Path
    version: int


@dataclass(frozen=True)
class Group:
    """One run's; a folder for each controller, or one for all of them."""

    places: Mapping[str, Place]
    name: str

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys(place.folder / self.name for place in self.places.values()))

    def add(self, process: int) -> None:
        """Its children belong to it too. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(f"{process}")

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel ended a process of it for that."""
        place = self.places["memory"]
        file = "memory.oom_control" if place.version == 1 else "memory.events"
        pairs = map(str.split, (place.folder / self.name / file).read_text().splitlines())
        return any(name == "oom_kill" and int(count) > 0 for name, count in pairs)


def described() -> str:
    """How memory and processes are counted here, for a reader."""
    if not places():
        return "memory counted for each process (no control group can be made here)"
    counted = ", ".join(f"{name} (cgroup v{place.version})" for name, place in places().items())
    return f"counted together: {counted}"


@contextlib.contextmanager
def group(*, memory: int, processes: int) -> Iterator[Group | None]:
    """A new group with these limits, in bytes and in number; None where none can be made.

    Raises:
        OSError: what could be made when it was tried first cannot be made now.
    """
    if not places():
        yield None
        return
    for place in places().values():
        _sweep(place.folder)
    with _group(places(), memory, processes) as made:
        yield made


@cache
def places() -> Mapping[str, Place]:
    """Where groups may be made, by controller; empty where memory cannot be counted."""
    found = {name: place for name in CONTROLLERS if (place := _place(name)) is not None}
    return found if "memory" in found and _works(found) else {}


def _works(found: Mapping[str, Place]) -> bool:
    """Tried with a process that waits: what may be written need not be what may be used."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as waiting:
        try:
            with _group(found, 1 << 30, 64) as made:
                made.add(waiting.pid)
                waiting.communicate()
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _group(found: Mapping[str, Place], memory: int, processes: int) -> Iterator[Group]:
    made = Group(found, f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for folder in made.folders:
            folder.mkdir()
        for file, limit in _limits(made, memory, processes).items():
            file.write_text(f"{limit}")
        yield made
    finally:
        for folder in made.folders:
            _remove(folder)


def _limits(made: Group, memory: int, processes: int) -> dict[Path, int]:
    """What to write where, in order; swap counts as memory, where the kernel counts it."""
    place = made.places["memory"]
    folder = place.folder / made.name
    if place.version == 1:
        limits = {folder / "memory.limit_in_bytes": memory}
        swap = {folder / "memory.memsw.limit_in_bytes": memory}
    else:
        limits = {folder / "memory.max": memory}
        swap = {folder / "memory.swap.max": 0}
    limits |= {file: limit for file, limit in swap.items() if file.exists()}
    if "pids" in made.places:
        limits[made.places["pids"].folder / made.name / "pids.max"] = processes
    return limits


def _place(controller: str) -> Place | None:
    for folder, version in _folders(controller):
        if not os.access(folder, os.W_OK | os.X_OK):
            continue
        if version == 1 or controller in _words(folder / "cgroup.subtree_control"):
            return Place(folder, version)
    return None


def _folders(controller: str) -> Iterator[tuple[Path, int]]:
    """The folder that this process is in, in version 1; in version 2 the one above as well: where
    processes are, a group cannot be divided."""
    own = _own_groups()
    for mounted, root, kind, options in _mounts():
        name = controller if kind == "cgroup" and controller in options else ""
        if (kind == "cgroup" and not name) or name not in own:
            continue
        with contextlib.suppress(ValueError):  # Of a part of the tree that is not mounted here.
            folder = mounted / Path(own[name]).relative_to(root)
            yield folder, 1 if name else 2
            if not name and folder != mounted:
                yield folder.parent, 2


def _own_groups() -> dict[str, str]:
    """This process's path in the tree of each controller of version 1, and as "" in version 2's."""
    found = {}
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _mounts() -> Iterator[tuple[Path, str, str, list[str]]]:
    """Where, which part of the tree, cgroup or cgroup2, and the controllers of version 1."""
    for line in _lines(Path("/proc/self/mountinfo")):
        place, _, system = line.partition(" - ")
        kind, _, options = (*system.split(" "), "", "")[:3]
        if kind in ("cgroup", "cgroup2"):
            root, mounted = place.split(" ")[3:5]
            yield Path(mounted), root, kind, options.split(",")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _sweep(folder: Path) -> None:
    """Remove groups of processes that are no more; one that is in use cannot be removed."""
    for left in folder.glob(f"{PREFIX}*-*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                left.rmdir()


def _remove(folder: Path) -> None:
    for _ in range(TRIES):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(PAUSE_SECONDS)
        else:
            return
