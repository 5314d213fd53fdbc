"""Slots on a CPU: a step's bookkeeping in two small kernels instead of forty calls of torch."""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dftserve.sampling.controls import (
    BUDGET_GAIN,
    BUDGET_HIGHEST_LEVEL,
    BUDGET_LOWEST_LEVEL,
    BUDGET_OPEN_LOOP,
    DEFAULT_CONSTANTS,
    LAW_CODES,
    TARGET_ENTROPY,
    Controls,
    LawConstants,
)
from dftserve.sampling.slots import (
    AFTER,
    BEFORE,
    CHANGED,
    COUNT,
    NOTHING_WAITS,
    TEMPERATURE,
    Slots,
)
from dftserve.sampling.transform import Statistics

# Kernels are numba's, not Python, to a type checker's eye.
# pyright: reportArgumentType=false, reportCallIssue=false

Array = np.ndarray[Any, Any]


class NumbaSlots(Slots):
    """`Slots`, whose tensors the kernels see as arrays."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str = "cpu",
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        super().__init__(slots, rows_per_request, device, constants)
        self._constants_C = np.array(constants.packed)

    def commit_accepted(
        self, controls: Controls, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> Controls:
        """As `Slots.commit_accepted`; returns the same controls where no row's law is `budget`, so
        that what was prepared for them stays good."""
        self._flush()
        level_R = torch.empty(len(slot_R))
        _commit_accepted(
            np.ascontiguousarray(slot_R.numpy()),
            np.ascontiguousarray(position_R.numpy()),
            np.ascontiguousarray(offset_R.numpy()),
            np.ascontiguousarray(controls.numbers_RF.numpy()),
            self._constants_C,
            level_R.numpy(),
            self._level_S.numpy(),
            self._steered_S.numpy(),
            self._tokens_S.numpy(),
            self._base_S.numpy(),
            self._sums_SF.numpy(),
            self._waiting_SKF.numpy(),
        )
        is_budget_R = controls.law_R == LAW_CODES["budget"]
        if not is_budget_R.any():
            return controls
        return controls.with_level(torch.where(is_budget_R, level_R, controls.level_R))

    def stage_step(
        self,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
        statistics: Statistics,
    ) -> None:
        """As `Slots.stage_step`, of rows that `commit_accepted` got before."""
        self._flush()
        _stage_step(
            np.ascontiguousarray(slot_R.numpy()),
            np.ascontiguousarray(position_R.numpy()),
            np.ascontiguousarray(offset_R.numpy()),
            np.ascontiguousarray(samples_R.numpy()),
            np.ascontiguousarray(statistics.valid_R.numpy()),
            *(np.ascontiguousarray(value_R.numpy()) for value_R in statistics.values()),
            self._base_S.numpy(),
            self._waiting_SKF.numpy(),
            self.invalid.view(1).numpy(),
        )


@njit
def _commit_accepted(
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    numbers_RF: Array,
    constants_C: Array,
    level_R: Array,
    level_S: Array,
    steered_S: Array,
    tokens_S: Array,
    base_S: Array,
    sums_SF: Array,
    waiting_SKF: Array,
) -> None:
    gain, open_loop = constants_C[BUDGET_GAIN], constants_C[BUDGET_OPEN_LOOP]
    lowest, highest = constants_C[BUDGET_LOWEST_LEVEL], constants_C[BUDGET_HIGHEST_LEVEL]
    slots, rows_per_request = waiting_SKF.shape[:2]
    # No other index is checked below.
    for r in range(len(slot_R)):
        if not (0 <= slot_R[r] < slots and 0 <= offset_R[r] < rows_per_request):
            raise IndexError("slots: a row's slot or offset is beyond what there is room for.")
    for r in range(len(slot_R)):
        s = slot_R[r]
        if offset_R[r] == 0:  # The first of its request's rows in this step.
            target = numbers_RF[r, TARGET_ENTROPY]
            accepted = min(max(position_R[r] - base_S[s], 0), rows_per_request)
            for k in range(accepted):
                if waiting_SKF[s, k, COUNT] > 0:
                    error = (target - waiting_SKF[s, k, AFTER]) / max(target, 0.1)
                    level_S[s] = min(max(level_S[s] + gain * error, lowest), highest)
                    steered_S[s] += 1
                for f in range(CHANGED + 1):
                    sums_SF[s, f] += waiting_SKF[s, k, f]
            tokens_S[s] += accepted
            waiting_SKF[s] = 0.0
        level_R[r] = level_S[s] if steered_S[s] >= open_loop else 0.0


@njit
def _stage_step(
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    samples_R: Array,
    valid_R: Array,
    before_R: Array,
    after_R: Array,
    temperature_R: Array,
    changed_R: Array,
    base_S: Array,
    waiting_SKF: Array,
    invalid_1: Array,
) -> None:
    for r in range(len(slot_R)):
        s, k = slot_R[r], offset_R[r]
        base_S[s] = position_R[r] - k if samples_R[r] else NOTHING_WAITS
        waiting_SKF[s, k] = 0.0
        if samples_R[r] and valid_R[r]:
            waiting_SKF[s, k, COUNT] = 1.0
            waiting_SKF[s, k, BEFORE] = before_R[r]
            waiting_SKF[s, k, AFTER] = after_R[r]
            waiting_SKF[s, k, TEMPERATURE] = temperature_R[r]
            waiting_SKF[s, k, CHANGED] = changed_R[r]
        elif samples_R[r]:
            invalid_1[0] += 1
