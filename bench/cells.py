"""Tables in Markdown, and their cells: values with their intervals, from the results."""

from collections.abc import Iterable, Mapping
from typing import Any


def table(head: str, rows: Iterable[Iterable[str]], caption: str | None = None) -> str:
    """A table in Markdown.

    Args:
        head: the first line, as in Markdown.
        rows: cells.
    """
    lines = [
        head,
        f"|{'---|' * (head.count('|') - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines if caption is None else [*lines, "", caption])


def interval(found: Mapping[str, float | None], digits: int) -> str:
    """A value with its interval, which begins at 0 or above."""
    value, low, high = found["value"], found["low"], found["high"]
    return f"{value:.{digits}f} [{max(low or 0.0, 0.0):.{digits}f}, {high:.{digits}f}]"


def change(found: Mapping[str, float], digits: int) -> str:
    """A difference with its sign."""
    return f"{found['value']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def percent(found: Mapping[str, float]) -> str:
    """A share with its interval, in per cent."""
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:.0f} % [{low:.0f}, {high:.0f}]"


def left_out(row: Mapping[str, Any]) -> str:
    """The share of answers that are too short; 0 for people's stories, chosen to be long enough."""
    return f"{100 * row['short']['value']:.0f} %" if "short" in row else "0 %"


TOO_SHORT = (
    "Too short: answers with fewer words than a style measurement needs (120); self-BLEU, style "
    "distance and SDS leave them out."
)
