"""Send requests with each notation of the field that a client offers, and write the outcomes.

    python CLIENT.py http://127.0.0.1:PORT results.jsonl

The scripts of this folder run in `.venv-clients`, without this project: they may import only the
standard library and the client itself.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "demo"
KEY = "test-key"
PROMPT = "Tell me a story about a lost key."
MESSAGES = [{"role": "user", "content": PROMPT}]
HEADER = "x-dftserve-diversity"
KINDS = {"plain": (0.5, False), "stream": (0.5, True), "wrong": (1.5, False)}
"""The requests of every way: the field's value, and whether it is a stream."""


@dataclass(frozen=True)
class Seen:
    """The parts of an answer that a client shows to its user."""

    answer: Any = None
    """The `diversity` object."""
    header: str | None = None
    """The name under which the client shows the header."""


@dataclass(frozen=True)
class Way:
    """A notation of the field on a route."""

    route: str
    written: str
    """Where the field is written, in the terms of docs/clients.md."""
    ask: Callable[[str, Any, bool], Seen]
    """(base URL, value, stream)"""


class RefusedError(Exception):
    """An error that a client reports other than by raising."""

    def __init__(
        self, name: str, text: str, status_code: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(text)
        self.name = name
        self.status_code = status_code
        self.param = param


def cases(ways: list[Way]) -> Iterator[tuple[str, Way, Any, bool]]:
    """(case, way, value, stream); the case is the first part of the requested path."""
    for number, way in enumerate(ways):
        for kind, (value, stream) in KINDS.items():
            yield f"{number}.{kind}", way, value, stream


def ask_all(ways: list[Way]) -> None:
    base, results = sys.argv[1], Path(sys.argv[2])
    with results.open("w") as lines:
        for case, way, value, stream in cases(ways):
            outcome = _outcome(way, f"{base}/{case}/v1", value, stream)
            about = {"case": case, "route": way.route, "written": way.written}
            lines.write(json.dumps(about | outcome) + "\n")


def _outcome(way: Way, url: str, value: Any, stream: bool) -> dict[str, Any]:
    try:
        seen = way.ask(url, value, stream)
    except Exception as error:  # noqa: BLE001 - any exception of a client is an outcome
        return {
            "error": error.name if isinstance(error, RefusedError) else type(error).__name__,
            "text": str(error),
            "status": getattr(error, "status_code", None),
            "param": getattr(error, "param", None),
        }
    return {"answer": seen.answer, "header": seen.header}


def header_in(headers: Any) -> str | None:
    """The name of our header among `headers`, which is anything with keys."""
    return next((name for name in dict(headers or {}) if name.lower().endswith(HEADER)), None)
