"""The guarantees that a server has to keep in each phase of bench/soak.py, and their checks."""

from collections.abc import Callable
from typing import Any

from scipy.stats import hypergeom

MEMORY_GROWTH = 0.01
"""Maximum growth of the server's processes, from the first tenth of the requests to the last."""
SECONDS_TO_IDLE = 5.0
HEALTH_SECONDS = 1.0
FALSE_ALARM = 0.001
"""The probability of a false alarm if both servers give valid answers equally often."""
OVERLOAD_STATUSES = {"200", "429", "503"}


def fuzz(found: dict[str, Any]) -> list[str]:
    broken = [f"{count} bodies: {problem}" for problem, count in found["complaints"].items()]
    in_log = found["in_log"]
    return broken + [
        f"the log contains {what}, {count} times" for what, count in in_log.items() if count
    ]


def served(found: dict[str, Any]) -> list[str]:
    broken = [] if set(found["outcomes"]) <= {"200"} else [f"answers: {found['outcomes']}"]
    growth = found["growth"]
    if growth > MEMORY_GROWTH:
        broken.append(f"memory grew by {growth:.2%}; at most {MEMORY_GROWTH:.0%}")
    return broken


def disconnects(found: dict[str, Any]) -> list[str]:
    seconds = found["seconds_to_idle"]
    if seconds is None:
        return [f"{found['left']} requests after {SECONDS_TO_IDLE:g} s"]
    return []


def schema(found: dict[str, Any]) -> list[str]:
    """Broken if fewer answers are valid than stock's, by Fisher's exact test, one-sided."""
    asked, ours, stock = found["requests"], found["valid"]["ours"], found["valid"]["stock"]
    broken = []
    if found["in_force"] < asked:
        broken.append(f"the field was in force in {found['in_force']} of {asked} answers")
    if float(hypergeom.cdf(ours, 2 * asked, ours + stock, asked)) < FALSE_ALARM:
        broken.append(f"{ours} of {asked} answers are valid, stock's {stock}")
    return broken


def overload(found: dict[str, Any]) -> list[str]:
    broken = []
    if other := set(found["outcomes"]) - OVERLOAD_STATUSES:
        broken.append(f"answers other than {', '.join(sorted(OVERLOAD_STATUSES))}: {sorted(other)}")
    health = found["health"]
    if not health["asked"]:
        broken.append("/health was never requested")
    if health["failed"]:
        broken.append(f"/health failed {health['failed']} times of {health['asked']}")
    if not health["worst_seconds"] < HEALTH_SECONDS:
        broken.append(f"/health took {health['worst_seconds']:.2f} s; under {HEALTH_SECONDS:g} s")
    return broken


JUDGES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "fuzz": fuzz,
    "served": served,
    "disconnects": disconnects,
    "schema": schema,
    "overload": overload,
}


def broken_promises(name: str, phase: dict[str, Any]) -> list[str]:
    """The guarantees that a phase broke: it must end, no server may die, and its own check."""
    if "failed" in phase:
        broken = [f"did not end: {phase['failed']}"]
    else:
        broken = JUDGES[name](phase["result"])
    return broken + [f"the server {engine} died" for engine in phase["died"]]
