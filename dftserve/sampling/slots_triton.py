"""Slots on a GPU: a step's bookkeeping in two small Triton kernels instead of forty launches, and
one launch for all requests that begin."""

# Kernels are Triton, not Python, to a type checker's eye.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import laws, slots
from dftserve.sampling.fused_triton import EXACT
from dftserve.sampling.laws import Controls
from dftserve.sampling.slots import Slots
from dftserve.sampling.transform import Statistics


class TritonSlots(Slots):
    """`Slots`, one program a row; nothing waits for the host, so no slot and no offset is checked:
    they are within what there is room for."""

    def settle(
        self, controls: Controls, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> Controls:
        """As `Slots.settle`."""
        self._flush()
        numbers_RF = torch.empty_like(controls.numbers_RF)
        _settle[(len(slot_R),)](
            slot_R,
            position_R,
            offset_R,
            controls.numbers_RF,
            numbers_RF,
            self._level_S,
            self._steered_S,
            self._tokens_S,
            self._base_S,
            self._sums_SF,
            self._waiting_SKF,
            len(slot_R),
            self._waiting_SKF.shape[1],
            **EXACT,
        )
        return Controls(numbers_RF, controls.stop_ids_RE)

    def _begin(self, order_NX: Tensor) -> None:
        """As `Slots._begin`."""
        _open[(len(order_NX),)](
            order_NX,
            self._level_S,
            self._steered_S,
            self._tokens_S,
            self._base_S,
            self._sums_SF,
            self._waiting_SKF,
            self._waiting_SKF.shape[1],
            **EXACT,
        )

    def remember(
        self,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
        statistics: Statistics,
    ) -> None:
        """As `Slots.remember`."""
        self._flush()
        _remember[(len(slot_R),)](
            slot_R,
            position_R,
            offset_R,
            samples_R,
            statistics.sound_R,
            *statistics.figures(),
            self._base_S,
            self._waiting_SKF,
            self.unsound,
            self._waiting_SKF.shape[1],
            **EXACT,
        )


# What a kernel reads from outside has to be marked so.
_COUNT, _AFTER = tl.constexpr(slots.COUNT), tl.constexpr(slots.AFTER)
_FIGURES = tl.constexpr(slots.CHANGED + 1)
_WIDE = tl.constexpr(triton.next_power_of_2(slots.CHANGED + 1))
_NOTHING_WAITS = tl.constexpr(slots.NOTHING_WAITS)
_NUMBERS = tl.constexpr(len(laws.NUMBERS))
_NUMBERS_WIDE = tl.constexpr(triton.next_power_of_2(len(laws.NUMBERS)))
_LAW, _LEVEL = tl.constexpr(laws.LAW), tl.constexpr(laws.LEVEL)
_TARGET = tl.constexpr(laws.TARGET_ENTROPY)
_BUDGET = tl.constexpr(laws.LAW_CODES["budget"])
_RATE = tl.constexpr(laws.BUDGET_RATE / laws.STRENGTH)
_LOWEST, _HIGHEST = (tl.constexpr(level) for level in laws.BUDGET_LEVELS)
_OPEN_LOOP = tl.constexpr(laws.BUDGET_OPEN_LOOP)


# A tensor of few rows may begin anywhere: no kernel of its own for each alignment.
_ANYWHERE = ["slot", "position", "offset"]


@triton.jit(
    do_not_specialize=["rows", "rows_per_request"],
    do_not_specialize_on_alignment=[*_ANYWHERE, "numbers", "numbers_after"],
)
def _settle(
    slot,
    position,
    offset,
    numbers,
    numbers_after,
    level,
    steered,
    tokens,
    base,
    sums,
    waiting,
    rows,
    rows_per_request,
):
    """The program of a request's first row does the work for all of them: its neighbours."""
    r = tl.program_id(0)
    if tl.load(offset + r) == 0:
        s = tl.load(slot + r)
        waiting += s * rows_per_request * _FIGURES
        accepted = tl.load(position + r) - tl.load(base + s)
        accepted = tl.minimum(tl.maximum(accepted, 0), rows_per_request)
        f = tl.arange(0, _WIDE)
        sum_F = tl.load(sums + s * _FIGURES + f, mask=f < _FIGURES, other=0.0)
        steered_level, count = tl.load(level + s), tl.load(steered + s)
        goal = tl.load(numbers + r * _NUMBERS + _TARGET)
        for k in range(accepted):
            row = waiting + k * _FIGURES
            sum_F += tl.load(row + f, mask=f < _FIGURES, other=0.0)
            error = (goal - tl.load(row + _AFTER)) / tl.maximum(goal, 0.1)
            moved = tl.minimum(tl.maximum(steered_level + _RATE * error, _LOWEST), _HIGHEST)
            counts = tl.load(row + _COUNT) > 0
            steered_level = tl.where(counts, moved, steered_level)
            count += counts.to(tl.int64)
        for k in range(rows_per_request):
            tl.store(waiting + k * _FIGURES + f, 0.0, mask=f < _FIGURES)
        tl.store(sums + s * _FIGURES + f, sum_F, mask=f < _FIGURES)
        tl.store(level + s, steered_level)
        tl.store(steered + s, count)
        tl.store(tokens + s, tl.load(tokens + s) + accepted)
        in_force = tl.where(count < _OPEN_LOOP, 0.0, steered_level)
        c = tl.arange(0, _NUMBERS_WIDE)
        for k in range(rows_per_request):
            n = tl.minimum(r + k, rows - 1)
            is_ours = (r + k < rows) & (tl.load(slot + n) == s) & (tl.load(offset + n) == k)
            is_there = c < tl.where(is_ours, _NUMBERS, 0)
            number = tl.load(numbers + n * _NUMBERS + c, mask=is_there)
            is_budget = tl.load(numbers + n * _NUMBERS + _LAW) == _BUDGET
            number = tl.where(c == tl.where(is_budget, _LEVEL, -1), in_force, number)
            tl.store(numbers_after + n * _NUMBERS + c, number, mask=is_there)


@triton.jit(
    do_not_specialize=["rows_per_request"],
    do_not_specialize_on_alignment=[
        *(*_ANYWHERE, "samples", "sound", "before", "after", "temperature", "changed")
    ],
)
def _remember(
    slot,
    position,
    offset,
    samples,
    sound,
    before,
    after,
    temperature,
    changed,
    base,
    waiting,
    unsound,
    rows_per_request,
):
    r = tl.program_id(0)
    s, k = tl.load(slot + r), tl.load(offset + r)
    is_sample, is_sound = tl.load(samples + r) != 0, tl.load(sound + r) != 0
    tl.store(base + s, tl.where(is_sample, tl.load(position + r) - k, _NOTHING_WAITS))
    counts = is_sample & is_sound
    row = waiting + (s * rows_per_request + k) * _FIGURES
    tl.store(row, counts.to(tl.float32))
    tl.store(row + 1, tl.where(counts, tl.load(before + r), 0.0))
    tl.store(row + 2, tl.where(counts, tl.load(after + r), 0.0))
    tl.store(row + 3, tl.where(counts, tl.load(temperature + r), 0.0))
    tl.store(row + 4, tl.where(counts, tl.load(changed + r), 0.0))
    tl.atomic_add(unsound, 1, mask=is_sample & (is_sound == 0))


@triton.jit(do_not_specialize=["rows_per_request"], do_not_specialize_on_alignment=["order"])
def _open(order, level, steered, tokens, base, sums, waiting, rows_per_request):
    """One program a request that begins: see `Slots._begin`."""
    order += tl.program_id(0) * (2 + _FIGURES)
    s = tl.load(order).to(tl.int64)
    f = tl.arange(0, _WIDE)
    sum_F = tl.load(order + 2 + f, mask=f < _FIGURES, other=0.0)
    tl.store(sums + s * _FIGURES + f, sum_F.to(tl.float32), mask=f < _FIGURES)
    for k in range(rows_per_request):
        row = waiting + (s * rows_per_request + k) * _FIGURES
        tl.store(row + f, 0.0, mask=f < _FIGURES)
    tl.store(tokens + s, tl.load(order + 1).to(tl.int64))
    tl.store(level + s, 0.0)
    tl.store(steered + s, 0)
    tl.store(base + s, _NOTHING_WAITS)
