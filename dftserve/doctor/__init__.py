"""What is installed, which runner will run, and is the plug-in active: here, and on a server.

    examine      this Python and its environment variables
    judge        one vLLM's source: a folder, or a wheel that is not installed
    ask          a running server
    verify       a running server, by requests

Nothing heavy is imported, but where there are styles: versions and files are read where they lie.
"""

from collections.abc import Mapping

from dftserve.doctor import contract, engine, entry_points, packages, styles, switches
from dftserve.doctor.behaviour import Report, verify
from dftserve.doctor.contract import judge
from dftserve.doctor.findings import Finding, as_json, aside, exit_code, shown
from dftserve.doctor.server import ask

__all__ = [
    "Finding",
    "Report",
    "as_json",
    "aside",
    "ask",
    "examine",
    "exit_code",
    "judge",
    "shown",
    "verify",
]


def examine(environment: Mapping[str, str], model: str | None = None) -> list[Finding]:
    """What this Python and these environment variables say; vLLM is not started.

    Args:
        model: what will be served, which the style profiles are compared with.
    """
    return [
        *packages.findings(),
        *entry_points.findings(environment),
        *switches.findings(environment),
        *styles.findings(environment, model),
        *engine.findings(environment),
        *contract.findings(),
    ]
