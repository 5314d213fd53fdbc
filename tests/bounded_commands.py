"""Runs `dftserve` commands with limited memory: one process does the imports and forks for each.

    with Commands() as commands:
        ended = commands.run("checkpoint", "verify", folder)

Run as a module, this file is that process.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPARE_BYTES = 1 << 30
"""Address space that a command may use in addition to that of the imports."""
HUNG_SECONDS = 300
"""A command that takes this long is taken to be hung; this is not a speed limit."""


@dataclass(frozen=True)
class Ended:
    """`code`: the exit code, negative if ended by a signal."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("Error: ")]


class Commands:
    def __enter__(self) -> "Commands":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bounded_commands"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, *arguments: object) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(each) for each in arguments]) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def main() -> None:
    import dftserve.evaluate.preference.human_test
    import dftserve.evaluate.preference.pairs
    import dftserve.evaluate.report.compare
    import dftserve.serve
    import dftserve.targets.run
    import dftserve.train.plan  # noqa: F401
    from dftserve.cli import main as command

    for line in sys.stdin:
        print(json.dumps(_forked(command, json.loads(line))), flush=True)


def _forked(command, arguments: list[str]) -> dict:
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _become(command, arguments, output.fileno())
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return {"code": os.waitstatus_to_exitcode(status), "output": output.read()}


def _become(command, arguments: list[str], output: int) -> None:
    for stream in (1, 2):
        os.dup2(output, stream)
    code = 1
    try:
        _bound()
        signal.alarm(HUNG_SECONDS)
        command(arguments, prog_name="dftserve")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  (Prints the same as Python would.)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _bound() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
