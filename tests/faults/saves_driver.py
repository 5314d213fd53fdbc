"""Trains and builds stores in child processes with injected kills and write errors.

    python -m tests.faults.saves_driver < orders

Each line of the input is an order in JSON, each line of the output its outcome. Every order is
carried out in a fork of this process, so that modules are imported only once. The faults of an
order:

    kill_at: i     SIGKILL before the i-th event: a file opened for writing, a folder made, a
                   rename, a removal, a sync, the middle of a file of tensors
    full_at: i     from the i-th event on, the disk is full: nothing can be opened, made, synced
    largest: n     no file can grow beyond n bytes, whichever library writes it
    kill: true     … and a write beyond them gets SIGXFSZ
    after: s       SIGKILL after s seconds
    bound: true    permissions apply to root too
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
NEEDS_SPACE = ("open", "os.mkdir", "sync", "middle")


@dataclass
class Events:
    """Counts the events below a folder, and injects the order's fault at one of them."""

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
        if self.full_at is not None and number >= self.full_at and name in NEEDS_SPACE:
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
        """Watch also syncs and files written by C++ or Rust, which audit hooks do not see."""
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

    def _watch(self, module: Any, name: str, index: int) -> None:
        """Two events around a writer of tensors; a kill at the second leaves half of the file."""
        original: Callable = getattr(module, name)

        def watched(*given: Any, **named: Any) -> Any:
            path = named.get("filename", given[index] if len(given) > index else None)
            if not isinstance(path, (str, Path)):
                return original(*given, **named)
            self.at("open", path)
            result = original(*given, **named)
            if self.seen == self.kill_at and os.path.abspath(path).startswith(self.folder):
                os.truncate(path, os.path.getsize(path) // 2)
            self.at("middle", path)
            return result

        setattr(module, name, watched)


def train(order: dict[str, Any]) -> None:
    train_run.train(TrainConfig(**order["settings"]))


def build(order: dict[str, Any]) -> None:
    store.SHARD_TOKENS = order["shard_tokens"]
    job = {n: Path(v) if n in ("corpus", "out") else v for n, v in order["settings"].items()}
    target_run.build(target_run.Job(**job), lambda line: None)


DO = {"train": train, "build": build}


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    """The exit code, error, number of events and seconds of an order, from a child process."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(order, writing)
    os.close(writing)
    if order.get("after") is not None:
        time.sleep(order["after"])
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, encoding="utf-8") as reader:
        report = reader.read()
    _, status = os.waitpid(child, 0)
    answer = {"ended": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
    return answer | (json.loads(report) if report else {})


def _child(order: dict[str, Any], writing: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    events = Events(order["folder"], order.get("kill_at"), order.get("full_at"))
    events.install()
    if order.get("largest") is not None:
        if order.get("kill"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], resource.RLIM_INFINITY))
    if order.get("bound"):
        _give_up_privileges()
    report: dict[str, Any] = {}
    try:
        DO[order["do"]](order)
    except Exception as error:  # noqa: BLE001
        kinds = [kind.__name__ for kind in type(error).__mro__]
        trace = traceback.format_exc()
        report = {"kinds": kinds, "error": f"{error}", "trace": trace}
    os.write(writing, json.dumps(report | {"events": events.seen}).encode())
    os._exit(1 if "kinds" in report else 0)


def _give_up_privileges() -> None:
    """Drop all capabilities by capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3_self = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if libc.capset(version_3_self, (ctypes.c_uint32 * 6)()):
        raise RuntimeError(f"capset: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
