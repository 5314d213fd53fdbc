"""Checks what is installed, which runner vLLM will use, and whether the plug-in is active.

    examine      this Python and its environment variables
    judge        a vLLM's source: a folder, or a wheel that is not installed
    ask          a running server
    verify       a running server, by sending it requests

Imports no large package, unless there are styles: versions and source files are read from disk.
"""

from collections.abc import Mapping

from dftserve.doctor import contract, engine, entry_points, packages, styles, switches
from dftserve.doctor.behaviour import MOST_TOKENS, REQUESTS, Report, verify
from dftserve.doctor.contract import judge
from dftserve.doctor.findings import Finding, as_json, as_text, aside, exit_code
from dftserve.doctor.server import ask

__all__ = [
    "MOST_TOKENS",
    "REQUESTS",
    "Finding",
    "Report",
    "as_json",
    "as_text",
    "aside",
    "ask",
    "examine",
    "exit_code",
    "judge",
    "verify",
]


def examine(environment: Mapping[str, str], model: str | None = None) -> list[Finding]:
    """Check this Python and these environment variables; vLLM is not started.

    Args:
        model: the model to be served; the style profiles are checked against it.
    """
    return [
        *packages.findings(),
        *entry_points.findings(environment),
        *switches.findings(environment),
        *styles.findings(environment, model),
        *engine.findings(environment),
        *contract.findings(),
    ]
