"""The results of checks, and how they are shown."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import click

State = Literal["ok", "warning", "error"]
COLOURS: Mapping[State, str] = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was checked, how it is, and a sentence about it."""

    name: str
    state: State
    text: str


def ok(name: str, text: str) -> Finding:
    """A finding without a problem."""
    return Finding(name, "ok", text)


def warning(name: str, text: str) -> Finding:
    """A finding that leaves the exit code at 0."""
    return Finding(name, "warning", text)


def error(name: str, text: str) -> Finding:
    """A finding that makes the exit code 1."""
    return Finding(name, "error", text)


def aside(findings: list[Finding]) -> list[Finding]:
    """The same findings with errors turned into warnings, when other findings decide."""
    return [warning(f.name, f.text) if f.state == "error" else f for f in findings]


def exit_code(findings: list[Finding]) -> int:
    """The command's exit code: 1 if any finding is an error, else 0."""
    return int(any(finding.state == "error" for finding in findings))


def as_text(findings: list[Finding]) -> str:
    """One line a finding, for a terminal."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(
        f"{click.style(f'{finding.state:<8}', fg=COLOURS[finding.state])}"
        f"{finding.name:<{width}}  {finding.text}"
        for finding in findings
    )


def as_json(findings: list[Finding]) -> str:
    """The findings for a program; `ok` is whether the exit code is 0."""
    listed = [asdict(finding) for finding in findings]
    return json.dumps({"ok": exit_code(findings) == 0, "findings": listed}, indent=2)
