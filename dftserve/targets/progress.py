"""How far a build is, in lines: for a log, where a terminal's bar would be of no use.

progress = Progress("tokens", say, total=1_000_000)
for tokens in done:
    progress.add(tokens)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

EVERY_SECONDS = 15.0


@dataclass
class Progress:
    """Says at intervals how many there are, how many a second, and how long the rest will take."""

    unit: str
    say: Callable[[str], object]
    total: int | None = None
    """None: how many there will be is not known."""
    clock: Callable[[], float] = time.monotonic
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._said_at, self._said = self.clock(), 0

    def add(self, count: int) -> None:
        self.done += count
        passed = self.clock() - self._said_at
        if passed < EVERY_SECONDS:
            return
        # Of the time since the line before: what an earlier start had done came at once.
        rate = (self.done - self._said) / passed
        self._said_at, self._said = self._said_at + passed, self.done
        self.say(f"  {self._counted()}, {rate:,.3g} a second{self._left(rate)}")

    def _counted(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"

    def _left(self, rate: float) -> str:
        if self.total is None or not rate:
            return ""
        return f", about {shown_seconds((self.total - self.done) / rate)} left"


def shown_seconds(seconds: float) -> str:
    """As a line says how long something takes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
