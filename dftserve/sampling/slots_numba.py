"""Slots on a CPU: a step's bookkeeping in two small kernels instead of forty calls of torch."""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dftserve.sampling import laws
from dftserve.sampling.laws import LAW_CODES, TARGET_ENTROPY, Controls
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

    def settle(
        self, controls: Controls, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> Controls:
        """As `Slots.settle`; the same controls where no row's law is `budget`, so that what was
        prepared for them stays good."""
        self._flush()
        level_R = torch.empty(len(slot_R))
        _settle(
            np.ascontiguousarray(slot_R.numpy()),
            np.ascontiguousarray(position_R.numpy()),
            np.ascontiguousarray(offset_R.numpy()),
            np.ascontiguousarray(controls.numbers_RF.numpy()),
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

    def remember(
        self,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
        statistics: Statistics,
    ) -> None:
        """As `Slots.remember`, of rows that were settled."""
        self._flush()
        _remember(
            np.ascontiguousarray(slot_R.numpy()),
            np.ascontiguousarray(position_R.numpy()),
            np.ascontiguousarray(offset_R.numpy()),
            np.ascontiguousarray(samples_R.numpy()),
            np.ascontiguousarray(statistics.sound_R.numpy()),
            *(np.ascontiguousarray(figure_R.numpy()) for figure_R in statistics.figures()),
            self._base_S.numpy(),
            self._waiting_SKF.numpy(),
            self.unsound.view(1).numpy(),
        )


_RATE = laws.BUDGET_RATE / laws.STRENGTH
_LOWEST, _HIGHEST = laws.BUDGET_LEVELS
_OPEN_LOOP = laws.BUDGET_OPEN_LOOP


@njit
def _settle(
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    numbers_RF: Array,
    level_R: Array,
    level_S: Array,
    steered_S: Array,
    tokens_S: Array,
    base_S: Array,
    sums_SF: Array,
    waiting_SKF: Array,
) -> None:
    slots, rows_per_request = waiting_SKF.shape[:2]
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
                    level_S[s] = min(max(level_S[s] + _RATE * error, _LOWEST), _HIGHEST)
                    steered_S[s] += 1
                for f in range(CHANGED + 1):
                    sums_SF[s, f] += waiting_SKF[s, k, f]
            tokens_S[s] += accepted
            waiting_SKF[s] = 0.0
        level_R[r] = level_S[s] if steered_S[s] >= _OPEN_LOOP else 0.0


@njit
def _remember(
    slot_R: Array,
    position_R: Array,
    offset_R: Array,
    samples_R: Array,
    sound_R: Array,
    before_R: Array,
    after_R: Array,
    temperature_R: Array,
    changed_R: Array,
    base_S: Array,
    waiting_SKF: Array,
    unsound_1: Array,
) -> None:
    for r in range(len(slot_R)):
        s, k = slot_R[r], offset_R[r]
        base_S[s] = position_R[r] - k if samples_R[r] else NOTHING_WAITS
        waiting_SKF[s, k] = 0.0
        if samples_R[r] and sound_R[r]:
            waiting_SKF[s, k, COUNT] = 1.0
            waiting_SKF[s, k, BEFORE] = before_R[r]
            waiting_SKF[s, k, AFTER] = after_R[r]
            waiting_SKF[s, k, TEMPERATURE] = temperature_R[r]
            waiting_SKF[s, k, CHANGED] = changed_R[r]
        elif samples_R[r]:
            unsound_1[0] += 1
