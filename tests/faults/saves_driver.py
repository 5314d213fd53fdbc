"""Trains and builds stores in children that end, or fail, where they are told to.

    python -m tests.faults.saves_driver < orders

Each line of the input is an order in JSON, each line of the output what became of it. The imports
are paid once: every order is carried out in a fork of this process. The faults of an order:

    kill_at: i     SIGKILL before its i-th event: a file opened to be written, a folder made, a
                   rename, a removal, a sync, the middle of a file of tensors
    full_at: i     from its i-th event on, the disk is full: nothing can be opened, made, synced
    largest: n     no file can grow beyond n bytes, whoever writes it
    kill: true     … and the one that wants to gets SIGXFSZ in the middle of the write
    after: s       SIGKILL after so many seconds
    bound: true    root is bound by permissions as everyone is
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import safetensors.torch
import torch
import transformers.modeling_utils

from dftserve.targets import run as target_run
from dftserve.targets import store
from dftserve.train import run as train_run
from dftserve.train.config import TrainConfig

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
GROWS = ("open", "os.mkdir", "sync", "middle")


@dataclass
class Events:
    """Counts what happens below a folder, and does what the order wants at one of them."""

    folder: str
    kill_at: int | None
    full_at: int | None
    seen: int = 0

    def at(self, name: str, path: object) -> None:
        if not os.path.abspath(os.fspath(path)).startswith(self.folder):  # type: ignore[call-overload]
            return
        number, self.seen = self.seen, self.seen + 1
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full_at is not None and number >= self.full_at and name in GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))  # type: ignore[arg-type]

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITES and isinstance(path, str):
                self.at(event, path)
        elif event in PATHS:
            path, descriptor = arguments[0], arguments[-1]
            inside = isinstance(descriptor, int) and descriptor >= 0 and event != "os.rename"
            if inside:
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
            self.at(event, path)

    def install(self) -> None:
        """Also where the audit does not look: syncs, and files that other languages write."""
        sync = os.fsync

        def watched(descriptor: int) -> None:
            self.at("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
            sync(descriptor)

        os.fsync = watched
        self._watch(torch, "save", 1)
        for module, name in (
            (safetensors.torch, "save_file"),
            (transformers.modeling_utils, "safe_save_file"),
        ):
            self._watch(module, name, 1)
        sys.addaudithook(self.audit)

    def _watch(self, module: Any, name: str, place: int) -> None:
        """Two events around a writer of tensors; at the second its file is written by half."""
        plain: Callable = getattr(module, name)

        def watched(*given: Any, **named: Any) -> Any:
            path = named.get("filename", given[place] if len(given) > place else None)
            if not isinstance(path, (str, Path)):
                return plain(*given, **named)
            self.at("open", path)
            found = plain(*given, **named)
            if self.seen == self.kill_at and os.path.abspath(path).startswith(self.folder):
                os.truncate(path, os.path.getsize(path) // 2)
            self.at("middle", path)
            return found

        setattr(module, name, watched)


def train(order: dict[str, Any]) -> None:
    train_run.train(TrainConfig(**order["settings"]))


def build(order: dict[str, Any]) -> None:
    store.SHARD_TOKENS = order["shard_tokens"]
    job = {n: Path(v) if n in ("corpus", "out") else v for n, v in order["settings"].items()}
    target_run.build(target_run.Job(**job), lambda line: None)


DO = {"train": train, "build": build}


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    """In a child; how it ended, what it said, how many events there were, how long it took."""
    told, tell = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(told)
        _child(order, tell)
    os.close(tell)
    if order.get("after") is not None:
        time.sleep(order["after"])
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(told, encoding="utf-8") as reader:
        said = reader.read()
    _, status = os.waitpid(child, 0)
    answer = {"ended": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
    return answer | (json.loads(said) if said else {})


def _child(order: dict[str, Any], tell: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    events = Events(order["folder"], order.get("kill_at"), order.get("full_at"))
    events.install()
    if order.get("largest") is not None:
        if order.get("kill"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], resource.RLIM_INFINITY))
    if order.get("bound"):
        _give_up_privileges()
    said: dict[str, Any] = {}
    try:
        DO[order["do"]](order)
    except Exception as error:  # noqa: BLE001
        kinds = [kind.__name__ for kind in type(error).__mro__]
        trace = traceback.format_exc()
        said = {"kinds": kinds, "error": f"{error}", "trace": trace}
    os.write(tell, json.dumps(said | {"events": events.seen}).encode())
    os._exit(1 if "kinds" in said else 0)


def _give_up_privileges() -> None:
    """All capabilities, by capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3_self = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if libc.capset(version_3_self, (ctypes.c_uint32 * 6)()):
        raise RuntimeError(f"capset: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
