"""`make sbom` and `make audit`: what the environment consists of, and what is known against it."""

import sys
from pathlib import Path

import separate_env
from setup import ROOT, VENV, run

PINNED = ROOT / "constraints" / "cpu.txt"
TOOLS = ROOT / "build" / "supply-chain-env"
REQUIREMENTS = ["cyclonedx-bom>=7", "pip-audit>=2.9"]
SBOM = ROOT / "build" / "sbom.json"


def sbom() -> None:
    """A CycloneDX document of `.venv`."""
    SBOM.parent.mkdir(exist_ok=True)
    output = ("--output-format", "JSON", "--output-file", SBOM)
    run(TOOLS / "bin" / "cyclonedx-py", "environment", *output, VENV / "bin" / "python")


def audit() -> None:
    """Fails on a known weakness, and on a package that could not be looked up."""
    run(TOOLS / "bin" / "pip-audit", "--strict", "--requirement", PINNED)


def main() -> None:
    wanted = {"sbom": sbom, "audit": audit}
    if len(sys.argv) != 2 or sys.argv[1] not in wanted:
        sys.exit(f"supply_chain.py: got {sys.argv[1:]}; accepted: {' or '.join(wanted)}.")
    separate_env.make(TOOLS, REQUIREMENTS, [Path(__file__)])
    wanted[sys.argv[1]]()


if __name__ == "__main__":
    main()
