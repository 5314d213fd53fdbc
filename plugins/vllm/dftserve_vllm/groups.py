"""Requests drawn as a group: what is refused, each choice's index, the codes of preempted requests.

A request with `"group": true` runs as n requests of the engine. Each of these carries the object
form, as if the client had requested the choices one by one.
"""

import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dftserve import spec
from dftserve.sampling import Step
from dftserve.sampling.draws import draw_key
from dftserve.sampling.group import GroupCodes, GroupRow, first_code
from dftserve_vllm.preempted import PreemptedStates
from dftserve_vllm.step_report import Array

if TYPE_CHECKING:
    from vllm import SamplingParams

PARAMETER = "diversity.group"

WATERMARKED = (
    "a group's tokens are drawn before the engine's sampler, so they would carry no watermark; "
    "drop --watermark-config or diversity.group"
)

StateArray = NDArray[np.float64]

_start = secrets.token_hex(8)
"""Part of the names of groups without a seed, so that their draws differ after each start."""


def clash(n: int, diversity: spec.Diversity) -> str | None:
    """Why a request's n is not compatible with its group, or None."""
    low, high = spec.GROUP_SIZE
    if diversity.group is True and not low <= n <= high:
        one = '{"id": …, "index": …, "size": …} for each of several requests'
        return f"{PARAMETER}: got true with n = {n}; accepted: n from {low} to {high}, or {one}."
    if isinstance(diversity.group, spec.Group) and n != 1:
        all_choices = "or true for the choices of one request"
        return f"{PARAMETER}: got one text's index with n = {n}; accepted: n = 1, {all_choices}."
    return None


def greedy_clash(temperature: float, diversity: spec.Diversity, whose: str = "") -> str | None:
    """Why a greedy request is not compatible with its group, or None.

    Args:
        whose: follows the temperature in the message.
    """
    if not diversity.group:
        return None
    return (
        f"temperature: got {temperature:g}{whose} with {PARAMETER}; accepted: above 0, since at 0 "
        "all texts are the same."
    )


def of_choice(
    diversity: spec.Diversity, index: int, size: int, seed: int | None, request_id: str
) -> dict[str, Any]:
    """One choice's diversity, in the object form."""
    name = ("request", _start, request_id) if seed is None else ("seed", seed)
    group = spec.Group(id=f"{draw_key('group', *name):012x}", index=index, size=size)
    return replace(diversity, group=group).as_dict()


def group_row(
    diversity: spec.Diversity, params: "SamplingParams", *, temperature_applied: bool
) -> GroupRow | None:
    """The workers' group settings for one choice; None for a request that is in no group."""
    group = diversity.group
    if not isinstance(group, spec.Group):
        return None
    return GroupRow(
        code=first_code(group.id, group.index, group.size),
        bits=math.log2(group.size),
        scale=1.0 if temperature_applied else 1.0 / params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        # The V1 runner applies min_p before the logits processors.
        min_p=0.0 if temperature_applied else params.min_p,
    )


class Codes:
    """An engine's group codes: by slot while a request runs, by identity while it is preempted."""

    def __init__(self, capacity: int, rows_per_request: int, device: torch.device) -> None:
        self._codes = GroupCodes(capacity, rows_per_request, device)
        self._preempted = PreemptedStates[StateArray]()

    def open(self, slot: int, row: GroupRow, identity: str | None, produced: int) -> None:
        """A request of a group enters a slot.

        Args:
            identity: identifies it across preemptions; without it, a preemption loses its code.
            produced: how many tokens it has already.
        """
        self.close(slot)
        resumed = self._preempted.enter(slot, identity, produced)
        self._codes.open(slot, row, resumed, produced)

    def close(self, slot: int) -> None:
        """The slot's request has left: it has ended, or was preempted."""
        self._preempted.leave(slot)
        self._codes.close(slot)

    def draws(self, slots_R: Array) -> NDArray[np.bool_]:
        """See `GroupCodes.draws`."""
        return self._codes.draws(slots_R)

    def draw(self, logits_XV: torch.Tensor, step: Step, most_rows: int) -> None:
        """See `GroupCodes.draw`."""
        self._preempted.record(self._codes.draw(logits_XV, step, most_rows))
