"""Slots on a CPU. A step updates them inside the transform's kernel, which calls `settle` and
`stage_row`."""

from typing import Any

import numpy as np
import torch
from numba import njit

from dftserve.sampling.controls import (
    BUDGET_GAIN,
    BUDGET_HIGHEST_LEVEL,
    BUDGET_LOWEST_LEVEL,
    BUDGET_OPEN_LOOP,
    DEFAULT_CONSTANTS,
    LAW,
    LAW_CODES,
    LEVEL,
    TARGET_ENTROPY,
    LawConstants,
)
from dftserve.sampling.slots import (
    AFTER,
    BEFORE,
    CHANGED,
    COLUMNS,
    COUNT,
    KL,
    NOTHING_WAITS,
    TEMPERATURE,
    Slots,
)

# Type checkers cannot analyse numba kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

Array = np.ndarray[Any, Any]
_BUDGET = LAW_CODES["budget"]


class NumbaSlots(Slots):
    """`Slots` that also exposes its tensors as arrays for the kernels."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str = "cpu",
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        super().__init__(slots, rows_per_request, device, constants)
        self._arrays = tuple(tensor.view(-1).numpy() for tensor in self._state[:-3])
        self._arrays += (self._sums_SF.numpy(), self._waiting_SKF.numpy())
        self._arrays += (self.invalid.view(1).numpy(),)
        self.nothing_known_S = np.zeros(slots, np.int32)
        """`Step.known_S` for a step in which every row is sampled."""

    def arrays(self) -> tuple[Array, ...]:
        """`Slots.state`, as arrays that share its memory; `invalid` has one element."""
        self._flush()
        return self._arrays


@njit
def check_slots(slot_R: Array, offset_R: Array, waiting_SKF: Array) -> None:
    """Raises IndexError for slots or offsets out of range; kernels do not check any others."""
    slots, rows_per_request = waiting_SKF.shape[:2]
    for r in range(len(slot_R)):
        if not (0 <= slot_R[r] < slots and 0 <= offset_R[r] < rows_per_request):
            raise IndexError("slots: a row's slot or offset is out of range.")


@njit
def settle(
    state: tuple[Array, ...], s: int, position: int, numbers_F: Array, constants_C: Array
) -> None:
    """`Slots.commit_accepted` for one request; `position` is that of its first row."""
    level_S, steered_S, tokens_S, base_S, sums_SF, waiting_SKF, _ = state
    gain = constants_C[BUDGET_GAIN]
    lowest, highest = constants_C[BUDGET_LOWEST_LEVEL], constants_C[BUDGET_HIGHEST_LEVEL]
    target = numbers_F[TARGET_ENTROPY]
    accepted = min(max(position - base_S[s], 0), waiting_SKF.shape[1])
    for k in range(accepted):
        if waiting_SKF[s, k, COUNT] > 0:
            error = (target - waiting_SKF[s, k, AFTER]) / max(target, 0.1)
            level_S[s] = min(max(level_S[s] + gain * error, lowest), highest)
            steered_S[s] += 1
        for f in range(COLUMNS):
            sums_SF[s, f] += waiting_SKF[s, k, f]
    tokens_S[s] += accepted
    waiting_SKF[s] = 0.0


@njit
def put_level_in_force(
    state: tuple[Array, ...], s: int, numbers_F: Array, constants_C: Array
) -> None:
    """Sets the level of a row with the law `budget` to the current steered level."""
    if numbers_F[LAW] == _BUDGET:
        is_closed = state[1][s] >= constants_C[BUDGET_OPEN_LOOP]
        numbers_F[LEVEL] = state[0][s] if is_closed else 0.0


@njit
def stage_row(
    state: tuple[Array, ...],
    s: int,
    k: int,
    position: int,
    samples: bool,
    valid: bool,
    values: tuple[float, float, float, float],
    style_stats_F: Array,
) -> None:
    """`Slots.stage_step` for one row, the k-th of its request."""
    _level_S, _steered_S, _tokens_S, base_S, _sums_SF, waiting_SKF, invalid_1 = state
    base_S[s] = position - k if samples else NOTHING_WAITS
    waiting_SKF[s, k] = 0.0
    if samples and valid:
        waiting_SKF[s, k, COUNT] = 1.0
        waiting_SKF[s, k, BEFORE] = values[0]
        waiting_SKF[s, k, AFTER] = values[1]
        waiting_SKF[s, k, TEMPERATURE] = values[2]
        waiting_SKF[s, k, CHANGED] = values[3]
        for f in range(COLUMNS - KL):
            waiting_SKF[s, k, KL + f] = style_stats_F[f]
    elif samples:
        invalid_1[0] += 1
