"""Reports the progress of a build as lines, for logs in which a progress bar is of no use.

progress = Progress("tokens", say, total=1_000_000)
for tokens in done:
    progress.add(tokens)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

EVERY_SECONDS = 15.0
"""Interval between two lines."""


@dataclass
class Progress:
    """Prints at intervals the count so far, the rate per second, and the time left."""

    unit: str
    say: Callable[[str], object]
    total: int | None = None
    """None: unknown."""
    clock: Callable[[], float] = time.monotonic
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._reported_at, self._reported = self.clock(), 0

    def add(self, count: int) -> None:
        self.done += count
        passed = self.clock() - self._reported_at
        if passed < EVERY_SECONDS:
            return
        # The rate since the last line: work done in an earlier run is added all at once.
        rate = (self.done - self._reported) / passed
        self._reported_at, self._reported = self._reported_at + passed, self.done
        self.say(f"  {self._counted()}, {rate:,.3g} a second{self._left(rate)}")

    def _counted(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"

    def _left(self, rate: float) -> str:
        if self.total is None or not rate:
            return ""
        return f", about {duration_text((self.total - self.done) / rate)} left"


def duration_text(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
