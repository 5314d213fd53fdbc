"""Run Python that a model wrote, and report whether it ran to its end.

    result = sandbox.run(program + tests, Limits(seconds=5))

The program runs as an unprivileged user in its own namespaces (processes, network, mounts, IPC). It
sees the interpreter, read-only, and one small folder, but nothing else of the machine: no network,
no environment, no other process. At its time limit all its processes are killed (sandbox_init.py).
bubblewrap creates the namespaces where it is installed and works, otherwise sandbox_init.py does.
System calls that such a program does not need are forbidden (seccomp.py), and where a control group
can be created, limits apply to all its processes together (cgroups.py). `described` tells which of
these are available. Without namespaces, `run` refuses. Kernel bugs are out of scope.

A program has passed if a random token was written after its last statement, so exiting early is not
a success. The token is in the program's own process: code that knows sandbox_init.py can forge it,
and an object that claims to equal everything passes any assert. This is for measuring models, not
for judging adversaries.

Standard library only.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.evaluate.accuracy.isolation import cgroups, seccomp
from dftserve.evaluate.accuracy.isolation.sandbox_init import BUBBLEWRAP, OUT_OF_MEMORY, OWN
from dftserve.evaluate.accuracy.isolation.sandbox_init import UNSAFE as UNCONFINED

UNSAFE = "--unsafe-no-sandbox"
CONFINE = Path(__file__).with_name("sandbox_init.py")
ENDS = ("ok", "exception", "exit", "timeout", "killed", "memory")
USERS = range(61184, 65520)
"""Users without an account: systemd's dynamic ones. One per run, since processes are counted per
user."""
STDERR_BYTES = 4000
"""The end of a program's stderr that is kept: enough for a traceback."""
OURS_BYTES, OURS_PROCESSES = 64 << 20, 4
"""Allowance for sandbox_init.py and bubblewrap, which are in the control group too."""
GRACE_SECONDS = 10.0
"""Time that a run may take beyond its limit to start and to clean up."""


@dataclass(frozen=True)
class Limits:
    """What one program may use: sizes in bytes, wall-clock time in seconds.

    In a control group all processes of a program share `memory`, plus `disk` for its files. Without
    one, memory is limited for each process: at most memory × processes in total, plus the kernel's
    memory for pipes and sockets, whose number `descriptors` limits.
    """

    seconds: float = 10.0
    memory: int = 512 << 20
    processes: int = 8
    file: int = 1 << 20
    disk: int = 8 << 20
    inodes: int = 1024
    """Files, folders and links."""
    descriptors: int = 64


@dataclass(frozen=True)
class Result:
    """How a program ended.

    `ended`: ok (ran to its end), exception, exit (exited before its end), timeout, killed (by a
    signal), memory. `stderr`: the end of what it wrote there.
    """

    passed: bool
    ended: str
    stderr: str
    seconds: float


LIMITS = Limits()


def run(
    source: str, limits: Limits = LIMITS, *, unsafe: bool = False, namespaces: str | None = None
) -> Result:
    """Run a program to its end or to its limits.

    Args:
        unsafe: run without the sandbox, as our own user; only the limits apply.
        namespaces: what creates them, `bubblewrap` or `own`; None: bubblewrap where it works.

    Raises:
        RuntimeError: the sandbox is not available here; nothing was run.
    """
    if sys.platform != "linux":
        raise RuntimeError(_refusal(f"it needs Linux, this is {sys.platform}"))
    if unsafe:
        return _run(source, limits, UNCONFINED)
    return _run(source, limits, namespaces or _default_namespaces())


@functools.cache
def available() -> str | None:
    """None where programs can be run in the sandbox, else what is missing."""
    try:
        result = run("pass")
    except RuntimeError as error:
        return str(error)
    return None if result.passed else f"sandbox: an empty program did not pass: {result}"


def described() -> str:
    """The isolation of programs from this machine, for a report: what is available, and why the
    rest is not."""
    no_bubblewrap = _no_bubblewrap()
    namespaces = "bubblewrap" if no_bubblewrap is None else f"own namespaces ({no_bubblewrap})"
    missing = _no_filter()
    calls = "system calls filtered" if missing is None else f"no filter of calls ({missing})"
    return f"{namespaces}; {calls}; {cgroups.described()}"


def _default_namespaces() -> str:
    return BUBBLEWRAP if _no_bubblewrap() is None else OWN


@functools.cache
def _no_bubblewrap() -> str | None:
    """Why bubblewrap is not used; None if it is."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    if (missing := _no_filter()) is not None:
        return f"{missing}, and bubblewrap leaves IPC unbounded without it"
    try:
        result = _run("pass", LIMITS, BUBBLEWRAP)
    except RuntimeError as error:
        return f"bubblewrap does not work here: {error}"
    return None if result.passed else f"bubblewrap: an empty program did not pass: {result}"


@functools.cache
def _no_filter() -> str | None:
    """Why system calls cannot be filtered; None if they can."""
    machine = os.uname().machine
    if seccomp.program(machine) is None:
        return f"the calls of {machine} are not known, only {', '.join(seccomp.AUDIT)}"
    with open("/proc/self/status") as status:
        built_in = any(line.startswith("Seccomp:") for line in status)
    return None if built_in else "this kernel has no seccomp"


def _run(source: str, limits: Limits, namespaces: str) -> Result:
    token = secrets.token_hex(16)
    is_filtered = namespaces != UNCONFINED and not _no_filter()
    code = seccomp.program(os.uname().machine) if is_filtered else None
    order = vars(limits) | {
        "source": source,
        "token": token,
        "namespaces": namespaces,
        "bubblewrap": shutil.which("bwrap"),
        "filter": None if code is None else code.hex(),
        "user": secrets.choice(USERS),
    }
    began = time.monotonic()
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryDirectory() as folder:
        report, proof = _run_in_group(order | {"folder": folder}, limits, stderr)
        seconds = time.monotonic() - began
        if "refused" in report:
            details = _tail(stderr).strip().replace("\n", " ")
            raise RuntimeError(_refusal(f"{report['refused']} {details}".rstrip()))
        passed = proof == token.encode()
        return Result(passed, "ok" if passed else _end(report), _tail(stderr), seconds)


def _run_in_group(
    order: dict[str, Any], limits: Limits, stderr: Any
) -> tuple[dict[str, Any], bytes]:
    """Run an order, in a control group if one can be created and the program is confined."""
    if order["namespaces"] == UNCONFINED:
        return _start(order, stderr, None)
    memory = limits.memory + limits.disk + OURS_BYTES
    processes = limits.processes + OURS_PROCESSES
    try:
        with cgroups.group(memory=memory, processes=processes) as group:
            report, proof = _start(order, stderr, group)
            if group is not None and group.ran_out_of_memory():
                report["memory"] = True
    except OSError as error:
        raise RuntimeError(f"sandbox: the control group: {error}") from None
    return report, proof


def _start(
    order: dict[str, Any], stderr: Any, group: cgroups.Group | None
) -> tuple[dict[str, Any], bytes]:
    """Start sandbox_init.py; return its report and what was written to the proof's pipe."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # Without the sandbox a survivor may keep it open.
    with open(reader, "rb", buffering=0) as proof:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CONFINE)],
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        message = json.dumps(order | {"proof": writer}).encode()
        try:
            if group is not None:
                group.add(process.pid)  # It waits for its order, and has no children yet.
            report, _ = process.communicate(message, timeout=order["seconds"] + GRACE_SECONDS)
        finally:
            process.kill()  # Its namespace ends with it.
            process.wait()
        if not report:
            raise RuntimeError(f"sandbox: sandbox_init.py failed:\n{_tail(stderr)}")
        return json.loads(report), proof.read(64) or b""


def _end(report: dict[str, Any]) -> str:
    if report.get("late"):
        return "timeout"
    if report.get("memory"):
        return "memory"
    if "status" not in report:
        return "killed"
    code = os.waitstatus_to_exitcode(report["status"])
    if code == -signal.SIGXCPU:
        return "timeout"
    if code < 0:
        return "killed"
    return {0: "exit", 1: "exception", OUT_OF_MEMORY: "memory"}.get(code, "exit")


def _tail(stderr: Any) -> str:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - STDERR_BYTES))
    return stderr.read().decode(errors="replace")


def _refusal(missing: str) -> str:
    return (
        f"sandbox: {missing}. It needs root, or user namespaces for unprivileged users, on Linux "
        f"5.12 or newer; {UNSAFE} runs the model's programs unprotected, as yourself."
    )
