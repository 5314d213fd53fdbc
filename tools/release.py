"""`make wheels`, `make tag`, `make smoke`: the two wheels of a release, and whether they serve.

    python3 tools/release.py wheels     # dist/*.whl
    python3 tools/release.py tag        # is $GITHUB_REF_NAME the version of both?
    python3 tools/release.py smoke      # installs them in build/release-env, beside an engine

Standard library only. None needs `.venv`.
"""

import os
import sys
import venv
from pathlib import Path

from setup import ROOT, install_on_cpu, run

DIST = ROOT / "dist"
ENVIRONMENT = ROOT / "build" / "release-env"
PROJECTS = (".", "./plugins/vllm")
TAG = "GITHUB_REF_NAME"
"""The environment variable in which GitHub names what was pushed."""


def wheels() -> None:
    """Anew: what another version left in dist/ is removed."""
    for old in DIST.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", DIST, *PROJECTS)
    _built()


def tag() -> None:
    """Nothing is published under another version than its tag names."""
    pushed = os.environ.get(TAG, "")
    tags = {f"v{wheel.name.split('-')[1]}" for wheel in _built()}
    if tags != {pushed}:
        accepted = " and ".join(sorted(tags))
        sys.exit(
            f"{TAG}: got {pushed!r}; accepted: {accepted}, by the wheels in {DIST}. Tag the commit "
            "that has this version in both pyproject.toml files, or give them the tag's."
        )


def smoke() -> None:
    """`dftserve doctor`, and a server that answers, from nothing but the wheels and an engine."""
    built = _built()
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    python = ENVIRONMENT / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "uv>=0.9")
    install_on_cpu(*map(str, built), venv=ENVIRONMENT)
    # Or a checkout on PYTHONPATH would be what is tried.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run(ENVIRONMENT / "bin" / "dftserve", "doctor", env=alone)
    run(python, "tools/smoke.py", env=alone)


def _built() -> list[Path]:
    found = sorted(DIST.glob("*.whl"))
    if [wheel.name.partition("-")[0] for wheel in found] != ["dftserve", "dftserve_vllm"]:
        names = ", ".join(wheel.name for wheel in found) or "no wheel"
        accepted = "one of dftserve and one of dftserve-vllm: make wheels"
        sys.exit(f"{DIST}: got {names}; accepted: {accepted}.")
    return found


def main() -> None:
    wanted = {"wheels": wheels, "tag": tag, "smoke": smoke}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(f"release.py: got {sys.argv[1:]}; accepted: {' or '.join(wanted)}.")
    wanted[sys.argv[1]]()


if __name__ == "__main__":
    main()
