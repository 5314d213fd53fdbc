"""A control group for one program: limits what all of its processes use together, including kernel
memory on their behalf.

    with group(memory=512 << 20, processes=16) as counted:
        if counted is not None:
            counted.add(process.pid)

Per-process limits do not count what processes share or leave in the kernel. A control group does,
where one can be created: as root with cgroup v1, as root or in a delegated part of the tree with
v2. The only changes to the tree are new folders for each run, which are removed afterwards; those
left behind by killed runs are removed by the next run.

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
"""For removing a group: the last of its processes may still be exiting."""


@dataclass(frozen=True)
class Place:
    """A folder in which groups can be created for a controller."""

    folder: Path
    version: int


@dataclass(frozen=True)
class Group:
    """The control group of one run: a folder for each controller, or one for all of them."""

    places: Mapping[str, Place]
    name: str

    @property
    def folders(self) -> list[Path]:
        return list(dict.fromkeys(place.folder / self.name for place in self.places.values()))

    def add(self, process: int) -> None:
        """Add a process; children that it starts later belong to the group too. Raises OSError."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(f"{process}")

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed one of its processes for lack of memory."""
        place = self.places["memory"]
        file = "memory.oom_control" if place.version == 1 else "memory.events"
        pairs = map(str.split, (place.folder / self.name / file).read_text().splitlines())
        return any(name == "oom_kill" and int(count) > 0 for name, count in pairs)


def described() -> str:
    """How memory and processes are counted on this machine, for a report."""
    if not places():
        return "memory counted for each process (no control group can be made here)"
    counted = ", ".join(f"{name} (cgroup v{place.version})" for name, place in places().items())
    return f"counted together: {counted}"


@contextlib.contextmanager
def group(*, memory: int, processes: int) -> Iterator[Group | None]:
    """A new group with these limits, in bytes and in number; None if none can be created.

    Raises:
        OSError: no group can be created now, although the first try succeeded.
    """
    if not places():
        yield None
        return
    for place in places().values():
        _sweep(place.folder)
    with _group(places(), memory, processes) as created:
        yield created


@cache
def places() -> Mapping[str, Place]:
    """Where groups can be created, by controller; empty if memory cannot be counted."""
    by_controller = {name: place for name in CONTROLLERS if (place := _place(name)) is not None}
    return by_controller if "memory" in by_controller and _works(by_controller) else {}


def _works(by_controller: Mapping[str, Place]) -> bool:
    """Try it with a waiting process: a folder that is writable may still not be usable."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as waiting:
        try:
            with _group(by_controller, 1 << 30, 64) as created:
                created.add(waiting.pid)
                waiting.communicate()
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _group(by_controller: Mapping[str, Place], memory: int, processes: int) -> Iterator[Group]:
    created = Group(by_controller, f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for folder in created.folders:
            folder.mkdir()
        for file, limit in _limits(created, memory, processes).items():
            file.write_text(f"{limit}")
        yield created
    finally:
        for folder in created.folders:
            _remove(folder)


def _limits(created: Group, memory: int, processes: int) -> dict[Path, int]:
    """The limit to write to each file, in order; swap is included if the kernel counts it."""
    place = created.places["memory"]
    folder = place.folder / created.name
    if place.version == 1:
        limits = {folder / "memory.limit_in_bytes": memory}
        swap = {folder / "memory.memsw.limit_in_bytes": memory}
    else:
        limits = {folder / "memory.max": memory}
        swap = {folder / "memory.swap.max": 0}
    limits |= {file: limit for file, limit in swap.items() if file.exists()}
    if "pids" in created.places:
        limits[created.places["pids"].folder / created.name / "pids.max"] = processes
    return limits


def _place(controller: str) -> Place | None:
    for folder, version in _folders(controller):
        if not os.access(folder, os.W_OK | os.X_OK):
            continue
        if version == 1 or controller in _words(folder / "cgroup.subtree_control"):
            return Place(folder, version)
    return None


def _folders(controller: str) -> Iterator[tuple[Path, int]]:
    """The folder of this process's group; in version 2 also its parent, since a group that contains
    processes cannot have subgroups with controllers."""
    own = _own_groups()
    for mounted, root, kind, options in _mounts():
        name = controller if kind == "cgroup" and controller in options else ""
        if (kind == "cgroup" and not name) or name not in own:
            continue
        with contextlib.suppress(ValueError):  # Its part of the tree is not mounted here.
            folder = mounted / Path(own[name]).relative_to(root)
            yield folder, 1 if name else 2
            if not name and folder != mounted:
                yield folder.parent, 2


def _own_groups() -> dict[str, str]:
    """This process's path in the tree of each version 1 controller, and under "" in version 2's."""
    groups = {}
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _mounts() -> Iterator[tuple[Path, str, str, list[str]]]:
    """Mount point, mounted part of the tree, cgroup or cgroup2, and the version 1 controllers."""
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
    """Remove the groups of processes that have ended; one in use cannot be removed."""
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
