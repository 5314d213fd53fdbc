"""Waiting for what another process does."""

import subprocess
import time
from collections.abc import Callable

from tests.conftest import PATIENCE


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait up to PATIENCE; fail at once if the process that should bring it about has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.02)
