"""Cells of tables: figures with their intervals, as the results have them."""

from collections.abc import Mapping
from typing import Any


def interval(found: Mapping[str, float | None], digits: int) -> str:
    value, low, high = found["value"], found["low"], found["high"]
    return f"{value:.{digits}f} [{max(low or 0.0, 0.0):.{digits}f}, {high:.{digits}f}]"


def left_out(row: Mapping[str, Any]) -> str:
    """People's stories were chosen to be long enough."""
    return f"{100 * row['short']['value']:.0f} %" if "short" in row else "0 %"
