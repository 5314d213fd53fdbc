"""The state of one HTTP request, from its field to its answer.

The middleware opens a context, `request_params` adds prompts to it, the engine's outputs fill in
the statistics, and the middleware writes them into the answer. Each asyncio task has one context.
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
from dftserve_vllm.adapters import Adapter, ChosenAdapter
from dftserve_vllm.extra_args import DIVERSITY, STYLE
from dftserve_vllm.step_report import Payload

TRACED = {
    "entropy_before": BEFORE,
    "entropy_after": AFTER,
    "temperature": TEMPERATURE,
    "changed": CHANGED,
}
"""The columns of a trace, and the columns of `slots` that they are read from."""


@dataclass(eq=False)
class TraceBudget:
    """How many more tokens of an HTTP request may be traced."""

    left: int = MOST_TRACED


@dataclass(eq=False)
class Trace:
    """The statistics of each of a choice's tokens, in order."""

    most: int
    """Maximum number of this choice's tokens; those of later tokens are dropped."""
    budget: TraceBudget = field(default_factory=TraceBudget)
    """Shared by all choices of the HTTP request, which may have many prompts."""
    columns: dict[str, list[float | None]] = field(
        default_factory=lambda: {name: [] for name in TRACED}
    )

    def add(self, row_X: Sequence[float] | None, tokens: int) -> None:
        """Add the statistics of a step's tokens.

        Args:
            row_X: the engine's report of the step; None if there is none.
        """
        traced = len(self.columns["changed"])
        tokens = min(tokens, self.most - traced, self.budget.left)
        self.budget.left -= tokens
        for row_F in last_tokens_of_row(row_X or (), tokens):
            for name, column in TRACED.items():
                value = None if row_F is None else round(row_F[column], 4)
                self.columns[name].append(value)


@dataclass(eq=False)
class ChoiceStatistics:
    """The statistics of one choice, as received so far."""

    law: str
    trace: Trace | None = None
    """If one was requested; shared with its further turns."""
    produced: int = 0
    """Tokens received from the engine."""
    payload: Payload | None = None
    """The engine's last report of the choice; see `step_report.put`."""
    is_taken: bool = False
    """Whether an engine request uses its name; no other request may use it then."""
    turns: list["ChoiceStatistics"] = field(default_factory=list)
    """Statistics of the engine's further requests for the choice, in order: see `next_turn`."""

    def means(self) -> list[float] | None:
        """Means over the choice's first engine request only, see `slots.means`; None if they are
        not known."""
        if self.payload is None:
            return None
        return means_of_row(self.payload["row"], self.produced)

    def means_of_all(self) -> list[float] | None:
        """Means over all tokens of the choice; None if those of any turn are not known."""
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
        """The style's statistics for the choice."""
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
    """For one prompt: the settings in force, the defaults dropped for them, and the statistics."""

    diversity: Diversity
    count: int
    """How many choices were requested."""
    dropped: dict[str, float] = field(default_factory=dict)
    clamped: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By field: the requested numbers that exceeded the operator's caps."""
    reason: str | None = None
    """Why the effective level is 0 although another one was requested."""
    style: Style | None = None
    has_diversity: bool = True
    """Whether the answer has a `diversity` object: it was requested, or is the default."""
    adapter: ChosenAdapter | None = None
    """The adapter that the style names, if it names no profile."""
    identity: str | None = None
    """The prompt's `diversity_id` in the engine; None if no row is changed."""
    choices: list[ChoiceStatistics] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [self._choice() for _ in range(self.count)]
        has_style = self.style is not None and not self.style.is_off
        if self.reason is None and (has_style or not self.diversity.is_off):
            self.identity = seals.sealed_name(self.carried(), self.count, http_request_name())
            _prompts[self.identity] = self

    def _choice(self) -> ChoiceStatistics:
        if not self.diversity.trace:
            return ChoiceStatistics(self.diversity.law)
        context = current.get()
        budget = TraceBudget() if context is None else context.trace_budget
        trace = Trace(max(MOST_TRACED // self.count, 1), budget)
        return ChoiceStatistics(self.diversity.law, trace)

    def carried(self) -> dict[str, Any]:
        """What is sent to the engine: the object forms."""
        fields: dict[str, Any] = {DIVERSITY: self.diversity.as_dict()}
        if self.style is not None and not self.style.is_off:
            fields[STYLE] = self.style.as_dict()
        return fields

    def effective(self, *, with_texts: bool = True) -> dict[str, dict[str, Any]]:
        """The object form of what is in force, by field.

        Args:
            with_texts: the requested form; otherwise that of `Diversity.without_texts`.
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
    """One HTTP request, with its prompts in order."""

    headers: Sequence[tuple[bytes, bytes]] = ()
    """The request's headers, in ASGI's form."""
    is_render: bool = False
    """Whether its route only returns what would be sent to the engine."""
    prompts: list[PromptContext] = field(default_factory=list)
    wants_usage: bool = False
    """Whether the answer is a stream whose last chunk has the usage."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the audit log that are not written yet."""
    status: int | None = None
    """The answer's status; None before it begins, or if there is no answer."""
    counted: set[tuple[Hashable, ...]] = field(default_factory=set)
    """The events for which it was counted: see `is_first`."""
    adapters: tuple[Adapter, ...] = ()
    """The adapters that a style may name on this route."""
    adapter: ChosenAdapter | None = None
    """The adapter selected for this request."""
    trace_budget: TraceBudget = field(default_factory=TraceBudget)
    name: str = field(default_factory=seals.fresh_name, init=False)
    """Unique among the requests of this process."""

    def choices(self) -> int:
        return sum(prompt.count for prompt in self.prompts)

    def members(self) -> dict[str, dict[str, Any]]:
        """The `diversity` and `style` objects of the answer, if it has them."""
        first = self.prompts[0]
        members = first.effective()
        choices = [choice for prompt in self.prompts for choice in prompt.choices]
        for name, answer in members.items():
            if clamped := first.clamped.get(name):
                answer["clamped"] = dict(clamped)
            if first.dropped:
                answer["dropped"] = first.dropped
            if name == STYLE and first.adapter is not None:
                continue  # An adapter does not involve the sampler, so it has no statistics.
            of_choice = ChoiceStatistics.of_style if name == STYLE else ChoiceStatistics.as_dict
            answer["choices"] = [of_choice(choice) for choice in choices]
        return members


current: ContextVar[RequestContext | None] = ContextVar("dftserve_request", default=None)


def generates() -> bool:
    """Whether the current HTTP request generates tokens; only then is it counted and logged. A
    router may render each request before it forwards it, and it would be counted twice."""
    context = current.get()
    return context is None or not context.is_render


def is_first(*event: Hashable) -> bool:
    """Whether this is the first call with this event in the current HTTP request: code that counts
    requests runs once for each prompt of a body. Always true outside a request."""
    context = current.get()
    if context is None:
        return True
    is_known = event in context.counted
    context.counted.add(event)
    return not is_known


def http_request_name() -> str | None:
    """The name of the current HTTP request; None outside a request."""
    context = current.get()
    return None if context is None else context.name


def adapter() -> ChosenAdapter | None:
    """The adapter selected for the current HTTP request."""
    context = current.get()
    return None if context is None else context.adapter


_prompts: "weakref.WeakValueDictionary[str, PromptContext]" = weakref.WeakValueDictionary()

_INDEX = re.compile("[0-9]{0,6}")
"""A choice's index in an identity; an identity without one means the first choice."""


def take_choice(identity: object) -> ChoiceStatistics | None:
    """The choice that `extra_args` identifies to the engine (see `extra_args.of_choice`), returned
    only once; None if the identity is of no request in progress here, or was taken before."""
    _, choice = _lookup(identity)
    if choice is None or choice.is_taken:
        return None
    choice.is_taken = True
    return choice


def next_turn(identity: object) -> ChoiceStatistics | None:
    """Statistics of a further engine request for a choice that is taken; None if the choice belongs
    to another HTTP request, whose identity the current one can only have copied.

    The Responses API sends a further request after each call of a built-in tool, with the first
    one's parameters, and gives one answer.
    """
    prompt, choice = _lookup(identity)
    context = current.get()
    if choice is None or context is None or prompt not in context.prompts:
        return None
    turn = ChoiceStatistics(choice.law, choice.trace)
    choice.turns.append(turn)
    return turn


def _lookup(identity: object) -> tuple[PromptContext | None, ChoiceStatistics | None]:
    name, _, index = identity.partition(".") if isinstance(identity, str) else ("", "", "")
    if (prompt := _prompts.get(name)) is None or not _INDEX.fullmatch(index):
        return None, None
    number = int(index or 0)
    return prompt, prompt.choices[number] if number < prompt.count else None
