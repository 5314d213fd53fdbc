"""Runs `vllm serve` many times and imports vLLM once: each server is a fork of one process.

    python -m tests.faults.forked_servers < orders

Each line of the input is an order in JSON: `argv` of the command, and the `log` for its output. Two
lines answer it: the server's process id, and its exit code when it has ended. vLLM's children are
forks too, so a server starts in seconds; its processes, sockets and signals are those of any other.
`ForkedServers` writes the orders.
"""

import contextlib
import json
import multiprocessing.context
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dftserve import serve


@dataclass(frozen=True)
class Started:
    url: str
    process_id: int
    log: Path


class ForkedServers:
    """Starts servers of one environment, one at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked_servers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()

    @contextlib.contextmanager
    def running(self, model: Path, *flags: str, log: Path) -> Iterator[Started]:
        """A running server, which is killed at the end of the block if it has not ended.

        Raises:
            RuntimeError: it ended before it answered; with the last lines of its log.
        """
        with serve.held_port() as port:
            address = ("--host", serve.HOST, "--port", str(port))
            order = {"argv": ["vllm", "serve", str(model), *flags, *address], "log": str(log)}
            assert self._process.stdin is not None
            print(json.dumps(order), file=self._process.stdin, flush=True)
            started = Started(f"http://{serve.HOST}:{port}", self._read_number(), log)
            try:
                _wait(started)
                yield started
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(started.process_id, signal.SIGKILL)
                self._read_number()

    def _read_number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def _wait(started: Started) -> None:
    while not serve._answers(f"{started.url}/health"):
        if not Path(f"/proc/{started.process_id}").exists():  # The parent has reaped it.
            raise serve._failure("ended before it answered", started.log)
        time.sleep(0.1)


def main() -> None:
    _import_vllm()
    for line in sys.stdin:
        order = json.loads(line)
        process_id = os.fork()
        if process_id == 0:
            _serve(order["argv"], order["log"])
        print(process_id, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1]), flush=True)


def _import_vllm() -> None:
    """Import the modules and load the plug-ins that a server's processes need."""
    methods = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    methods["spawn"] = methods["fork"]  # vLLM asks for spawn on a CPU.
    _let_metrics_be_shared()
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.cli.serve
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.model_executor.models.llama
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.plugins import load_general_plugins

    _let_aborts_end()
    load_general_plugins()


def _let_metrics_be_shared() -> None:
    """prometheus_client reads the environment on import, and vLLM sets it only later."""
    from prometheus_client import values

    shared = values.MultiProcessValue()

    def value(*arguments, **named):
        is_shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        return (shared if is_shared else values.MutexValue)(*arguments, **named)

    values.ValueClass = value


def _let_aborts_end() -> None:
    """When vLLM 0.32 aborts, it cancels the task that notifies the requests in flight that the
    engine is gone. If its event loop is late, they are not notified yet, and the server waits for
    them forever, with or without the plug-in. The task ends by itself after it has notified them.
    """
    from vllm.v1.engine import async_llm

    async_llm.cancel_task_threadsafe = lambda task: None


def _serve(argv: list[str], log: str) -> None:
    """Run the server in the child process; never returns."""
    os.setsid()  # A new process group, which can be killed as a whole.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.argv = argv
    from vllm.entrypoints.cli.main import main as vllm

    try:
        vllm()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
