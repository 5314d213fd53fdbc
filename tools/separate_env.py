"""Environments apart from the engine's, for packages that would change its versions."""

import hashlib
import sys
from pathlib import Path

from setup import VENV, run, uv_install


def make(folder: Path, requirements: list[str], inputs: list[Path]) -> None:
    """The environment `folder` with `requirements`, by `.venv`'s uv.

    Nothing is done while `inputs` (files) and the Python are those it was made with.
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
