"""Environments separate from the engine's, for packages that would change its versions."""

import hashlib
import sys
from pathlib import Path

from setup import VENV, run, uv_install


def make(folder: Path, requirements: list[str], inputs: list[Path]) -> None:
    """Make the environment `folder` with `requirements`, with the uv of `.venv`.

    Does nothing if `inputs` (files) and the Python have not changed since it was made.
    """
    if not (VENV / "bin" / "uv").exists():
        sys.exit(f"{VENV}: no uv in it; run tools/setup.py first (make setup).")
    stamp, wanted = folder / "dftserve-setup", _fingerprint(inputs)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    run(VENV / "bin" / "uv", "venv", "--clear", "--python", sys.executable, folder)
    uv_install("--python", str(folder), *requirements)
    stamp.write_text(wanted)


def _fingerprint(inputs: list[Path]) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for path in inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()
