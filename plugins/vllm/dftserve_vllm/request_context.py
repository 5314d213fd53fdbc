"""What one HTTP request asked for and got, from its field to its answer.

The middleware opens a record, the field adds an item for every prompt, the engine's output fills
in the figures, and the middleware writes them into the answer. One task, one context.
"""

import itertools
import os
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dftserve.sampling.slots import AFTER, BEFORE, CHANGED, TEMPERATURE
from dftserve.spec import Diversity

_numbers = itertools.count()


@dataclass(eq=False)
class PromptContext:
    """One prompt's diversity: what is in force, what was dropped for it, what came of it."""

    diversity: Diversity
    choices: int
    dropped: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    """Why the effective level is 0 although one was asked for."""
    identity: str | None = None
    """Names the figures in the workers; None where no row is changed."""
    figures: list[dict[str, float] | None] | None = None

    def __post_init__(self) -> None:
        if self.reason is None and not self.diversity.is_off:
            self.identity = f"{os.getpid():x}-{next(_numbers):x}"
            _items[self.identity] = self
        else:
            self.figures = list[dict[str, float] | None]([None] * self.choices)

    def choice_identity(self, choice: int) -> str:
        """As `hooks` gives it to the children of a request for several choices."""
        return f"{self.identity}.{choice}" if self.choices > 1 else str(self.identity)

    def fill(self, means: dict[str, list[float] | None]) -> None:
        """`means`: see `Account.means`, by choice identity; missing ones are not known."""
        known = (means.get(self.choice_identity(choice)) for choice in range(self.choices))
        self.figures = [_named(values) for values in known]

    def effective(self) -> dict[str, Any]:
        """The object form of what is in force."""
        as_asked = self.diversity.as_dict()
        return as_asked if self.reason is None else as_asked | {"level": 0, "reason": self.reason}


@dataclass(eq=False)
class RequestContext:
    """All items of one HTTP request, in the order of its prompts."""

    items: list[PromptContext] = field(default_factory=list)
    wants_usage: bool = False
    """A stream whose last chunk carries usage."""

    def choices(self) -> int:
        return sum(item.choices for item in self.items)

    def answer(self) -> dict[str, Any]:
        """The `diversity` object of the answer."""
        first = self.items[0]
        answer = first.effective()
        if first.dropped:
            answer["dropped"] = first.dropped
        answer["choices"] = [
            figures for item in self.items for figures in (item.figures or [None] * item.choices)
        ]
        return answer


current: ContextVar[RequestContext | None] = ContextVar("dftserve_record", default=None)

_items: "weakref.WeakValueDictionary[str, PromptContext]" = weakref.WeakValueDictionary()


def item_of(identity: str) -> PromptContext | None:
    return _items.get(identity)


def _named(means: list[float] | None) -> dict[str, float] | None:
    if means is None:
        return None
    return {
        "tokens": int(means[0]),
        "mean_entropy_before": round(means[BEFORE], 6),
        "mean_entropy_after": round(means[AFTER], 6),
        "mean_temperature": round(means[TEMPERATURE], 6),
        "tokens_changed": round(means[CHANGED], 6),
    }
