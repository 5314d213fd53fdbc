"""vLLM's router before a server, on loopback."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dftserve.serve import _free_port
from tests.conftest import PATIENCE, ROOT

ENVIRONMENT = ROOT / ".venv-clients"


@contextlib.contextmanager
def before(upstream: str, place: Path) -> Iterator[str]:
    """Its address; its log is in `place`."""
    command = ENVIRONMENT / "bin" / "vllm-router"
    if not command.exists():
        pytest.skip(f"no {command}: run `make clients-env`")
    port, metrics = _free_port(), _free_port()
    log = place / "router.log"
    options = ["--host=127.0.0.1", f"--port={port}", f"--worker-urls={upstream}"]
    options += ["--prometheus-host=127.0.0.1", f"--prometheus-port={metrics}"]
    with log.open("w") as file:
        process = subprocess.Popen([command, *options], stdout=file, stderr=file)
    try:
        _await(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """It listens when its server is well."""
    until = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the router is not there:\n{log.read_text()}")
