"""`make wheels`, `make tag`, `make smoke`: build the two wheels of a release and test them.

    python3 tools/release.py wheels     # builds dist/*.whl
    python3 tools/release.py tag        # checks that $GITHUB_REF_NAME is the version of both
    python3 tools/release.py smoke      # installs them with an engine in build/release-env

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
"""The environment variable that GitHub sets to the name of the pushed tag."""


def wheels() -> None:
    """Build the wheels, after removing old ones from dist/."""
    for old in DIST.glob("*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", DIST, *PROJECTS)
    _built()


def tag() -> None:
    """Check that the version of the wheels is that of the tag."""
    pushed = os.environ.get(TAG, "")
    tags = {f"v{wheel.name.split('-')[1]}" for wheel in _built()}
    if tags != {pushed}:
        accepted = " and ".join(sorted(tags))
        sys.exit(
            f"{TAG}: got {pushed!r}; accepted: {accepted}, by the wheels in {DIST}. Tag the commit "
            "that has this version in both pyproject.toml files, or set their version to the tag's."
        )


def smoke() -> None:
    """Run `dftserve doctor` and a server, with only the wheels and an engine installed."""
    built = _built()
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    python = ENVIRONMENT / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "uv>=0.9")
    install_on_cpu(*map(str, built), venv=ENVIRONMENT)
    # Otherwise a checkout on PYTHONPATH would be tested instead of the wheels.
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
