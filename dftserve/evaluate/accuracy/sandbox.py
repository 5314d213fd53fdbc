"""Run Python that a model wrote, and learn whether it came to its end.

    result = sandbox.run(program + tests, Limits(seconds=5))

The program runs as an unprivileged user in namespaces of its own (processes, network, mounts, IPC):
it sees the interpreter read-only, one small folder of its own and nothing else of the machine, no
network, no environment, no other process, and when its time is over nothing of it is left
(sandbox_init.py). Where this cannot be had, `run` refuses. Bugs of the kernel are outside.

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
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dftserve.evaluate.accuracy.sandbox_init import OUT_OF_MEMORY

UNSAFE = "--unsafe-no-sandbox"
CONFINE = Path(__file__).with_name("sandbox_init.py")
ENDS = ("ok", "exception", "exit", "timeout", "killed", "memory")
USERS = range(61184, 65520)
"""Users without an account: systemd's dynamic ones. One a run, for processes count by user."""
STDERR_BYTES = 4000
GRACE_SECONDS = 10.0
"""What a run may take beyond its limit to begin and to be cleared away."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Bytes, and seconds by the clock.

    Memory is counted for each process, so all of a program have at most memory × processes.
    """

    seconds: float = 10.0
    memory: int = 512 << 20
    processes: int = 8
    file: int = 1 << 20
    disk: int = 8 << 20
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


def run(source: str, limits: Limits = LIMITS, *, unsafe: bool = False) -> Result:
    """Run a program to its end or to its limits.

    Args:
        unsafe: without the sandbox, as ourselves: only the limits hold.

    Raises:
        RuntimeError: the sandbox cannot be had here; nothing was run.
    """
    if sys.platform != "linux":
        raise RuntimeError(_refusal(f"it needs Linux, this is {sys.platform}"))
    token = secrets.token_hex(16)
    order = vars(limits) | {"source": source, "token": token, "sandboxed": not unsafe}
    order |= {"user": secrets.choice(USERS)}
    began = time.monotonic()
    with tempfile.TemporaryFile() as stderr, tempfile.TemporaryDirectory() as folder:
        report, proof = _ordered(order | {"folder": folder}, stderr)
        seconds = time.monotonic() - began
        if "refused" in report:
            raise RuntimeError(_refusal(report["refused"]))
        passed = proof == token.encode()
        return Result(passed, "ok" if passed else _end(report), _tail(stderr), seconds)


@functools.cache
def available() -> str | None:
    """None where programs can be run in the sandbox, else what is missing."""
    try:
        result = run("pass")
    except RuntimeError as error:
        return str(error)
    return None if result.passed else f"sandbox: an empty program did not pass: {result}"


def _ordered(order: dict[str, Any], stderr: Any) -> tuple[dict[str, Any], bytes]:
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
