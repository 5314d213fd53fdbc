"""Run Python that a model wrote, and learn whether it came to its end.

    result = sandbox.run(program + tests, Limits(seconds=5))

The program runs as an unprivileged user in namespaces of its own (processes, network, mounts, IPC):
it sees the interpreter read-only, one small folder of its own and nothing else of the machine, no
network, no environment, no other process, and when its time is over nothing of it is left
(sandbox_init.py). bubblewrap makes the namespaces where it is installed and works, sandbox_init.py
itself elsewhere. System calls that such a program has no use for are forbidden (seccomp.py), and
where a control group can be made all that its processes use is counted together (cgroups.py);
`described` says what of this is to be had here. Where there are no namespaces, `run` refuses. Bugs
of the kernel are outside.

That a program passed is proven by a random token that is written after its last statement, so
leaving early is no success. The token is in the program's own process: code that studies
sandbox_init.py can forge it, and an object that claims to equal everything passes any assert. This
measures models; it does not judge adversaries.

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
"""Users without an account: systemd's dynamic ones. One a run, for processes count by user."""
STDERR_BYTES = 4000
OURS_BYTES, OURS_PROCESSES = 64 << 20, 4
"""What the control group holds besides the program: sandbox_init.py and bubblewrap."""
GRACE_SECONDS = 10.0
"""What a run may take beyond its limit to begin and to be cleared away."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Bytes, and seconds by the clock.

    In a control group all processes of a program share `memory`, and `disk` for its files. Where
    none can be made memory is counted for each process: together at most memory × processes, and
    besides what the kernel keeps for pipes and sockets, of which `descriptors` are the bound.
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

    `ended`: ok (came to its end), exception, exit (left before it), timeout, killed (by a signal),
    memory. `stderr`: the last of what it wrote there.
    """

    passed: bool
    ended: str
    stderr: str
    seconds: float


LIMITS = Limits()


def run(
    source: str, limits: Limits = LIMITS, *, unsafe: bool = False, way: str | None = None
) -> Result:
    """Run a program to its end or to its limits.

    Args:
        unsafe: without the sandbox, as ourselves: only the limits hold.
        way: who makes the namespaces, `bubblewrap` or `own`; None: bubblewrap where it works.

    Raises:
        RuntimeError: the sandbox cannot be had here; nothing was run.
    """
    if sys.platform != "linux":
        raise RuntimeError(_refusal(f"it needs Linux, this is {sys.platform}"))
    if unsafe:
        return _run(source, limits, UNCONFINED)
    return _run(source, limits, way or _way())


@functools.cache
def available() -> str | None:
    """None where programs can be run in the sandbox, else what is missing."""
    try:
        result = run("pass")
    except RuntimeError as error:
        return str(error)
    return None if result.passed else f"sandbox: an empty program did not pass: {result}"


def described() -> str:
    """What stands between programs and this machine, for a report: what is to be had, and why the
    rest is not."""
    no_bubblewrap = _no_bubblewrap()
    namespaces = "bubblewrap" if no_bubblewrap is None else f"own namespaces ({no_bubblewrap})"
    missing = _no_filter()
    calls = "system calls filtered" if missing is None else f"no filter of calls ({missing})"
    return f"{namespaces}; {calls}; {cgroups.described()}"


def _way() -> str:
    return BUBBLEWRAP if _no_bubblewrap() is None else OWN


@functools.cache
def _no_bubblewrap() -> str | None:
    """Why bubblewrap is not used; None where it is."""
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
    """Why system calls cannot be filtered; None where they can."""
    machine = os.uname().machine
    if seccomp.program(machine) is None:
        return f"the calls of {machine} are not known, only {', '.join(seccomp.AUDIT)}"
    with open("/proc/self/status") as status:
        built_in = any(line.startswith("Seccomp:") for line in status)
    return None if built_in else "this kernel has no seccomp"


def _run(source: str, limits: Limits, way: str) -> Result:
    token = secrets.token_hex(16)
    code = seccomp.program(os.uname().machine) if way != UNCONFINED and not _no_filter() else None
    order = vars(limits) | {
        "source": source,
        "token": token,
        "way": way,
        "bubblewrap": shutil.which("bwrap"),
        "filter": None if code is None else code.hex(),
        "user": secrets.choice(USERS),
    }
    began = time.monotonic()
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryDirectory() as folder:
        report, proof = _counted(order | {"folder": folder}, limits, stderr)
        seconds = time.monotonic() - began
        if "refused" in report:
            said = _tail(stderr).strip().replace("\n", " ")
            raise RuntimeError(_refusal(f"{report['refused']} {said}".rstrip()))
        passed = proof == token.encode()
        return Result(passed, "ok" if passed else _end(report), _tail(stderr), seconds)


def _counted(order: dict[str, Any], limits: Limits, stderr: Any) -> tuple[dict[str, Any], bytes]:
    """The same, in a control group where one can be made and the program is confined."""
    if order["way"] == UNCONFINED:
        return _ordered(order, stderr, None)
    memory = limits.memory + limits.disk + OURS_BYTES
    processes = limits.processes + OURS_PROCESSES
    try:
        with cgroups.group(memory=memory, processes=processes) as group:
            report, proof = _ordered(order, stderr, group)
            if group is not None and group.ran_out_of_memory():
                report["memory"] = True
    except OSError as error:
        raise RuntimeError(f"sandbox: the control group: {error}") from None
    return report, proof


def _ordered(
    order: dict[str, Any], stderr: Any, group: cgroups.Group | None
) -> tuple[dict[str, Any], bytes]:
    """What sandbox_init.py reported, and what came through the proof's pipe."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # Without the sandbox a survivor may hold the other end.
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
            said, _ = process.communicate(message, timeout=order["seconds"] + GRACE_SECONDS)
        finally:
            process.kill()  # Its namespace ends with it.
            process.wait()
        if not said:
            raise RuntimeError(f"sandbox: sandbox_init.py failed:\n{_tail(stderr)}")
        return json.loads(said), proof.read(64) or b""


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
