"""Runs a test file again, in a process where Triton interprets its kernels."""

import os
import subprocess
import sys


def run(file: str) -> str:
    """pytest's output for the file; asserts that its tests passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:randomly", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout
