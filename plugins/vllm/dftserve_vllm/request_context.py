"""What one HTTP request asked for and got, from its field to its answer.

The middleware opens a context, the field adds a prompt to it, the engine's outputs fill in the
statistics, and the middleware writes them into the answer. One task, one context.
"""

import itertools
import os
import secrets
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dftserve.sampling.slots import AFTER, BEFORE, CHANGED, TEMPERATURE, means_of_row
from dftserve.spec import Diversity
from dftserve_vllm.step_report import Payload

_numbers = itertools.count()
_start = secrets.token_hex(4)
"""In identities, so that requests without a seed draw otherwise after each start."""


@dataclass(eq=False)
class ChoiceStatistics:
    """What came of one choice, as far as it is known."""

    law: str
    produced: int = 0
    """Tokens that the engine has sent."""
    payload: Payload | None = None
    """The engine's last report of it; see `step_report.put`."""

    def means(self) -> list[float] | None:
        """[tokens, entropy before, entropy after, temperature, changed], means over its tokens;
        None where they are not known."""
        if self.payload is None:
            return None
        return means_of_row(self.payload["row"], self.produced)

    def as_dict(self) -> dict[str, float] | None:
        values = self.means()
        if values is None:
            return None
        return {
            "tokens": int(values[0]),
            "mean_entropy_before": round(values[BEFORE], 6),
            "mean_entropy_after": round(values[AFTER], 6),
            "mean_temperature": round(values[TEMPERATURE], 6),
            "tokens_changed": round(values[CHANGED], 6),
        }


@dataclass(eq=False)
class PromptContext:
    """One prompt's diversity: what is in force, what was dropped for it, what came of it."""

    diversity: Diversity
    count: int
    """How many choices were asked for."""
    dropped: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    """Why the effective level is 0 although one was asked for."""
    identity: str | None = None
    """Names it to the engine; None where no row is changed."""
    choices: list[ChoiceStatistics] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [ChoiceStatistics(self.diversity.law) for _ in range(self.count)]
        if self.reason is None and not self.diversity.is_off:
            self.identity = f"{os.getpid():x}-{_start}-{next(_numbers):x}"
            _prompts[self.identity] = self

    def effective(self) -> dict[str, Any]:
        """The object form of what is in force."""
        as_asked = self.diversity.as_dict()
        return as_asked if self.reason is None else as_asked | {"level": 0, "reason": self.reason}


@dataclass(eq=False)
class RequestContext:
    """All prompts of one HTTP request, in their order."""

    prompts: list[PromptContext] = field(default_factory=list)
    wants_usage: bool = False
    """A stream whose last chunk carries usage."""

    def choices(self) -> int:
        return sum(prompt.count for prompt in self.prompts)

    def answer(self) -> dict[str, Any]:
        """The `diversity` object of the answer."""
        first = self.prompts[0]
        answer = first.effective()
        if first.dropped:
            answer["dropped"] = first.dropped
        answer["choices"] = [
            choice.as_dict() for prompt in self.prompts for choice in prompt.choices
        ]
        return answer


current: ContextVar[RequestContext | None] = ContextVar("dftserve_request", default=None)

_prompts: "weakref.WeakValueDictionary[str, PromptContext]" = weakref.WeakValueDictionary()


def choice_of(identity: str) -> ChoiceStatistics | None:
    """The choice that `extra_args` names to the engine: see `extra_args.of_choice`."""
    name, _, choice = identity.partition(".")
    prompt = _prompts.get(name)
    return None if prompt is None else prompt.choices[int(choice or 0)]
