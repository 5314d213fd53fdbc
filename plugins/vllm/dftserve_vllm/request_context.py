"""What one HTTP request asked for and got, from its field to its answer.

The middleware opens a context, the field adds a prompt to it, the engine's outputs fill in the
statistics, and the middleware writes them into the answer. One task, one context.
"""

import re
import weakref
from collections.abc import Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dftserve.sampling.slots import (
    AFTER,
    BEFORE,
    CHANGED,
    HELD_BACK,
    KL,
    STRENGTH,
    TEMPERATURE,
    last_tokens_of_row,
    means_of_row,
)
from dftserve.spec import MOST_TRACED, Diversity, Style
from dftserve_vllm import seals
from dftserve_vllm.adapters import Adapter, Chosen
from dftserve_vllm.extra_args import DIVERSITY, STYLE
from dftserve_vllm.step_report import Payload

TRACED = {
    "entropy_before": BEFORE,
    "entropy_after": AFTER,
    "temperature": TEMPERATURE,
    "changed": CHANGED,
}
"""The columns of a trace, and those of `slots` that they are read from."""


@dataclass(eq=False)
class TraceBudget:
    """How many more tokens of one HTTP request may be traced."""

    left: int = MOST_TRACED


@dataclass(eq=False)
class Trace:
    """The figures of a choice's tokens, one by one, in their order."""

    most: int
    """Tokens of this choice; the figures of later ones are dropped."""
    budget: TraceBudget = field(default_factory=TraceBudget)
    """Of all choices of its HTTP request, which may have many prompts."""
    columns: dict[str, list[float | None]] = field(
        default_factory=lambda: {name: [] for name in TRACED}
    )

    def add(self, row_X: Sequence[float] | None, tokens: int) -> None:
        """A step's tokens.

        Args:
            row_X: what the engine reported of the step; None where it did not.
        """
        kept = len(self.columns["changed"])
        tokens = min(tokens, self.most - kept, self.budget.left)
        self.budget.left -= tokens
        for row_F in last_tokens_of_row(row_X or (), tokens):
            for name, column in TRACED.items():
                known = None if row_F is None else round(row_F[column], 4)
                self.columns[name].append(known)


@dataclass(eq=False)
class ChoiceStatistics:
    """What came of one choice, as far as it is known."""

    law: str
    trace: Trace | None = None
    """Where one was asked for; that of its further turns too."""
    produced: int = 0
    """Tokens that the engine has sent."""
    payload: Payload | None = None
    """The engine's last report of it; see `step_report.put`."""
    is_taken: bool = False
    """Whether a request of the engine has its name: no other one may have it."""
    turns: list["ChoiceStatistics"] = field(default_factory=list)
    """Of the engine's further requests for it, in their order: see `next_turn`."""

    def means(self) -> list[float] | None:
        """Of its own request of the engine alone, see `slots.means`; None where they are not
        known."""
        if self.payload is None:
            return None
        return means_of_row(self.payload["row"], self.produced)

    def means_of_all(self) -> list[float] | None:
        """Of all its tokens; None where those of one turn are not known: no part is told as the
        whole."""
        all_means = [turn.means() for turn in (self, *self.turns)]
        known = [means for means in all_means if means is not None]
        if len(known) < len(all_means):
            return None
        tokens = sum(count for count, *_ in known)
        shares = [[count / tokens * mean for mean in means] for count, *means in known]
        return [tokens, *map(sum, zip(*shares, strict=True))]

    def as_dict(self) -> dict[str, Any] | None:
        values = self.means_of_all()
        if values is None:
            return None
        means = {
            "tokens": int(values[0]),
            "mean_entropy_before": round(values[BEFORE], 6),
            "mean_entropy_after": round(values[AFTER], 6),
            "mean_temperature": round(values[TEMPERATURE], 6),
            "tokens_changed": round(values[CHANGED], 6),
        }
        return means if self.trace is None else means | {"trace": self.trace.columns}

    def of_style(self) -> dict[str, float] | None:
        """What the style did to it."""
        values = self.means_of_all()
        if values is None:
            return None
        return {
            "tokens": int(values[0]),
            "mean_kl": round(values[KL], 6),
            "effective_strength": round(values[STRENGTH], 6),
            "phrases_held_back": round(1000 * values[HELD_BACK], 6),
        }


@dataclass(eq=False)
class PromptContext:
    """What is in force for one prompt, what was dropped for it, what came of it."""

    diversity: Diversity
    count: int
    """How many choices were asked for."""
    dropped: dict[str, float] = field(default_factory=dict)
    clamped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By field: what was asked for beyond the operator's caps."""
    reason: str | None = None
    """Why the effective level is 0 although one was asked for."""
    style: Style | None = None
    has_diversity: bool = True
    """Whether the answer speaks of the diversity: it was asked for, or is the default."""
    adapter: Chosen | None = None
    """What the style named, where it is no profile."""
    identity: str | None = None
    """Names it to the engine; None where no row is changed."""
    choices: list[ChoiceStatistics] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [self._choice() for _ in range(self.count)]
        has_style = self.style is not None and not self.style.is_off
        if self.reason is None and (has_style or not self.diversity.is_off):
            self.identity = seals.sealed_name(self.carried(), self.count, opened())
            _prompts[self.identity] = self

    def _choice(self) -> ChoiceStatistics:
        if not self.diversity.trace:
            return ChoiceStatistics(self.diversity.law)
        context = current.get()
        budget = TraceBudget() if context is None else context.trace_budget
        trace = Trace(max(MOST_TRACED // self.count, 1), budget)
        return ChoiceStatistics(self.diversity.law, trace)

    def carried(self) -> dict[str, Any]:
        """What goes to the engine: the object forms."""
        found: dict[str, Any] = {DIVERSITY: self.diversity.as_dict()}
        if self.style is not None and not self.style.is_off:
            found[STYLE] = self.style.as_dict()
        return found

    def effective(self, *, with_texts: bool = True) -> dict[str, dict[str, Any]]:
        """The object form of what is in force, by field.

        Args:
            with_texts: as it was asked for; else as `Diversity.without_texts`.
        """
        fields: dict[str, dict[str, Any]] = {}
        if self.has_diversity:
            none = {} if self.reason is None else {"level": 0, "reason": self.reason}
            form = self.diversity.as_dict if with_texts else self.diversity.without_texts
            fields[DIVERSITY] = form() | none
        if self.style is not None:
            none = {} if self.reason is None else {"strength": 0, "reason": self.reason}
            fields[STYLE] = self.style.as_dict() | none
        if self.adapter is not None:
            fields[STYLE] = self.adapter.as_dict()
        return fields


@dataclass(eq=False)
class RequestContext:
    """All prompts of one HTTP request, in their order."""

    headers: Sequence[tuple[bytes, bytes]] = ()
    """Of the request, as ASGI has them."""
    is_render: bool = False
    """Its route says what would be sent to the engine, and sends nothing."""
    prompts: list[PromptContext] = field(default_factory=list)
    wants_usage: bool = False
    """A stream whose last chunk carries usage."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the audit log that are not written yet."""
    status: int | None = None
    """Of the answer, as it begins; None before, and where there is none."""
    counted: set[tuple[Hashable, ...]] = field(default_factory=set)
    """What it was counted for: see `is_first`."""
    adapters: tuple[Adapter, ...] = ()
    """Those that a style may name on this route."""
    adapter: Chosen | None = None
    """The one that vLLM was told to use."""
    trace_budget: TraceBudget = field(default_factory=TraceBudget)
    name: str = field(default_factory=seals.fresh_name, init=False)
    """Tells it from every other request of this process."""

    def choices(self) -> int:
        return sum(prompt.count for prompt in self.prompts)

    def members(self) -> dict[str, dict[str, Any]]:
        """The `diversity` and the `style` object of the answer, as far as it has them."""
        first = self.prompts[0]
        members = first.effective()
        choices = [choice for prompt in self.prompts for choice in prompt.choices]
        for name, answer in members.items():
            if clamped := first.clamped.get(name):
                answer["clamped"] = dict(clamped)
            if first.dropped:
                answer["dropped"] = first.dropped
            if name == STYLE and first.adapter is not None:
                continue  # No sampler sees an adapter: there is nothing to count.
            of_choice = ChoiceStatistics.of_style if name == STYLE else ChoiceStatistics.as_dict
            answer["choices"] = [of_choice(choice) for choice in choices]
        return members


current: ContextVar[RequestContext | None] = ContextVar("dftserve_request", default=None)


def generates() -> bool:
    """Whether tokens come of the HTTP request at hand: only then it is counted and noted. A router
    may render each request before it sends it on, which would make two of it."""
    opened = current.get()
    return opened is None or not opened.is_render


def is_first(*event: Hashable) -> bool:
    """Whether the HTTP request at hand has not been asked for this event before: what is counted by
    request is met for each prompt of a body. Outside of a request each event is the first."""
    context = current.get()
    if context is None:
        return True
    is_known = event in context.counted
    context.counted.add(event)
    return not is_known


def opened() -> str | None:
    """The name of the HTTP request that runs; None outside of one."""
    context = current.get()
    return None if context is None else context.name


def adapter() -> Chosen | None:
    """The one that vLLM was told to use for the HTTP request that runs."""
    context = current.get()
    return None if context is None else context.adapter


_prompts: "weakref.WeakValueDictionary[str, PromptContext]" = weakref.WeakValueDictionary()

_INDEX = re.compile("[0-9]{0,6}")
"""Of a choice in a name; a name without one means the first."""


def take_choice(identity: object) -> ChoiceStatistics | None:
    """The choice that `extra_args` names to the engine (see `extra_args.of_choice`), once; None
    where the name is of no request that is under way here, or is taken."""
    _, choice = _named(identity)
    if choice is None or choice.is_taken:
        return None
    choice.is_taken = True
    return choice


def next_turn(identity: object) -> ChoiceStatistics | None:
    """Statistics of a further request of the engine for a choice that is taken; None where it is
    of another HTTP request than the one that runs, which can only have seen the name.

    The Responses API makes one after each call of a built-in tool, with the parameters of the
    first, and gives one answer.
    """
    prompt, choice = _named(identity)
    context = current.get()
    if choice is None or context is None or prompt not in context.prompts:
        return None
    turn = ChoiceStatistics(choice.law, choice.trace)
    choice.turns.append(turn)
    return turn


def _named(identity: object) -> tuple[PromptContext | None, ChoiceStatistics | None]:
    name, _, index = identity.partition(".") if isinstance(identity, str) else ("", "", "")
    if (prompt := _prompts.get(name)) is None or not _INDEX.fullmatch(index):
        return None, None
    number = int(index or 0)
    return prompt, prompt.choices[number] if number < prompt.count else None
