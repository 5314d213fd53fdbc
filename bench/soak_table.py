"""The table of bench/soak.py's result: what was required of each phase, and what was found."""

from collections.abc import Callable
from typing import Any

import cells


def table(document: dict[str, Any]) -> str:
    """For docs/results.md."""
    rows = []
    for name, phase in document["phases"].items():
        asked, cell_of = CELLS[name]
        found = f"failed: {phase['failed'][:80]}" if "failed" in phase else cell_of(phase["result"])
        kept = "yes" if not phase["broken"] else f"no: {'; '.join(phase['broken'])[:200]}"
        rows.append(" ".join(cell.split()) for cell in (name, asked, found, kept))  # No newlines.
    scale, machine = document["scale"], document["machine"]
    # Phases may come from several runs.
    minutes = sum(phase["seconds"] for phase in document["phases"].values()) / 60
    caption = (
        f"`bench/soak.py --scale {scale:g}` ({'the full size' if scale >= 1 else 'a part'} of "
        f"scale 1; it took {minutes:.0f} minutes): vLLM "
        f"{document['versions']['vllm']}, V1 runner, {machine['cores']} cores, the stories' model."
    )
    return cells.table("| | asked | found | kept |", rows, caption)


def _fuzz(found: dict[str, Any]) -> str:
    return (
        f"{found['bodies']:,} bodies, {found['refused']:,} refused; complaints "
        f"{sum(found['complaints'].values())}; 5xx {found['faults']['ours']}, stock's "
        f"{found['faults']['stock']}; in the log {sum(found['in_log'].values())}"
    )


def _served(found: dict[str, Any]) -> str:
    ours = (
        f"{found['requests']:,} requests at {found['requests_per_second']:.0f} a second; "
        f"{_memory(found)}"
    )
    if (stock := found.get("stock")) is None:  # An older result, without stock's results.
        return ours
    ours_more, stock_more = found["grown_mib"]["ours"], found["grown_mib"]["stock"]
    more = ", ".join(
        f"{name} {ours_more[name]:+.1f} and {stock_more[name]:+.1f}"
        for name in ours_more
        if name in stock_more
    )
    return f"{ours}; stock's {_memory(stock)}; MiB more, ours and stock's: {more}"


def _memory(found: dict[str, Any]) -> str:
    first, last = (found["own_mib"][tenth] for tenth in (0, -1))
    return f"{first:,.0f} MiB after a tenth, {last:,.0f} MiB at the end ({found['growth']:+.2%})"


def _disconnects(found: dict[str, Any]) -> str:
    seconds = found["seconds_to_idle"]
    left = f"{found['left']} left" if seconds is None else f"0 after {seconds:.1f} s"
    return f"{found['cut']:,} cut, {found['complete']:,} ended before that; {left}"


def _schema(found: dict[str, Any]) -> str:
    valid = found["valid"]
    return f"{found['requests']:,} each: {valid['ours']:,} valid, stock's {valid['stock']:,}"


def _overload(found: dict[str, Any]) -> str:
    ours = (
        f"{found['clients']} clients, {found['slots']} slots, {found['seconds']:.0f} s: "
        f"{_answers(found)}"
    )
    stock = found.get("stock")  # None in an older result, without stock's results.
    return ours if stock is None else f"{ours}; stock's: {_answers(stock)}"


def _answers(found: dict[str, Any]) -> str:
    outcomes = ", ".join(f"{count:,} × {outcome}" for outcome, count in found["outcomes"].items())
    return f"{outcomes}; /health {1000 * found['health']['worst_seconds']:.0f} ms at worst"


CELLS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "fuzz": ("no death, no 5xx that stock has not, 400 with `param`, a clean log", _fuzz),
    "served": ("memory (PSS of all processes, less pages of files) at most +1 %", _served),
    "disconnects": ("none running or waiting after 5 s", _disconnects),
    "schema": ("as often valid as stock's at `diversity` 1", _schema),
    "overload": ("200, 429 and 503 only, /health under 1 s", _overload),
}
"""By phase, the requirement and a function that formats the result."""
