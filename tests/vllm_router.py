"""vLLM's router in front of a server, on loopback."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dftserve.serve import held_port
from tests.conftest import ROOT
from tests.local_server import listening

ENVIRONMENT = ROOT / ".venv-clients"


@contextlib.contextmanager
def before(upstream: str, place: Path) -> Iterator[str]:
    """Run it with its log in `place`; yields its address."""
    command = ENVIRONMENT / "bin" / "vllm-router"
    if not command.exists():
        pytest.skip(f"no {command}: run `make clients-env`")
    with held_port() as port, held_port() as metrics:
        options = ["--host=127.0.0.1", f"--port={port}", f"--worker-urls={upstream}"]
        options += ["--prometheus-host=127.0.0.1", f"--prometheus-port={metrics}"]
        # It listens once its server is healthy.
        with listening([command, *options], port, place / "router.log") as url:
            yield url
