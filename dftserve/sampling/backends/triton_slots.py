"""Slots on a GPU: a step's bookkeeping in two small Triton kernels instead of forty launches, and
one launch for all requests that begin."""

# Kernels are Triton, not Python, to a type checker's eye.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import slots
from dftserve.sampling.controls import DEFAULT_CONSTANTS, LAW_CODES, Controls, LawConstants
from dftserve.sampling.slots import Slots
from dftserve.sampling.transform import Statistics

EXACT = {"enable_fp_fusion": False}
"""Launch options of every kernel: the same product has the same bits in all of them, since ties
between tokens must stay ties."""


class TritonSlots(Slots):
    """`Slots`, one program a row; nothing waits for the host, so no slot and no offset is checked:
    they are within what there is room for."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str,
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        super().__init__(slots, rows_per_request, device, constants)
        self._constants_C = torch.tensor(constants.packed, dtype=torch.float32, device=device)

    def commit_accepted(
        self, controls: Controls, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> Controls:
        """As `Slots.commit_accepted`."""
        self._flush()
        numbers_RF = torch.empty_like(controls.numbers_RF)
        _commit_accepted[(len(slot_R),)](
            slot_R,
            position_R,
            offset_R,
            controls.numbers_RF,
            numbers_RF,
            self._constants_C,
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
        return Controls(numbers_RF, controls.stop_ids_RE, controls.last_token_R)

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

    def stage_step(
        self,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
        statistics: Statistics,
    ) -> None:
        """As `Slots.stage_step`."""
        self._flush()
        _stage_step[(len(slot_R),)](
            slot_R,
            position_R,
            offset_R,
            samples_R,
            statistics.valid_R,
            *statistics.values(),
            self._base_S,
            self._waiting_SKF,
            self.invalid,
            self._waiting_SKF.shape[1],
            **EXACT,
        )


# What a kernel reads from outside has to be marked so.
_COUNT, _AFTER = tl.constexpr(slots.COUNT), tl.constexpr(slots.AFTER)
_COLUMNS = tl.constexpr(slots.CHANGED + 1)
_WIDE = tl.constexpr(triton.next_power_of_2(slots.CHANGED + 1))
_NOTHING_WAITS = tl.constexpr(slots.NOTHING_WAITS)
_NUMBERS = tl.constexpr(len(columns.NUMBERS))
_NUMBERS_WIDE = tl.constexpr(triton.next_power_of_2(len(columns.NUMBERS)))
_LAW, _LEVEL = tl.constexpr(columns.LAW), tl.constexpr(columns.LEVEL)
_TARGET = tl.constexpr(columns.TARGET_ENTROPY)
_BUDGET = tl.constexpr(LAW_CODES["budget"])
_GAIN = tl.constexpr(columns.BUDGET_GAIN)
_LOWEST = tl.constexpr(columns.BUDGET_LOWEST_LEVEL)
_HIGHEST = tl.constexpr(columns.BUDGET_HIGHEST_LEVEL)
_OPEN_LOOP = tl.constexpr(columns.BUDGET_OPEN_LOOP)


# A tensor of few rows may begin anywhere: no kernel of its own for each alignment.
_ANYWHERE = ["slot", "position", "offset"]


@triton.jit(
    do_not_specialize=["rows", "rows_per_request"],
    do_not_specialize_on_alignment=[*_ANYWHERE, "numbers", "numbers_after", "constants"],
)
def _commit_accepted(
    slot,
    position,
    offset,
    numbers,
    numbers_after,
    constants,
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
        # 1. How many of the rows that wait in the slot were accepted since.
        s = tl.load(slot + r)
        waiting += s * rows_per_request * _COLUMNS
        accepted = tl.load(position + r) - tl.load(base + s)
        accepted = tl.minimum(tl.maximum(accepted, 0), rows_per_request)
        # 2. Add them up, and steer by each.
        gain, open_loop = tl.load(constants + _GAIN), tl.load(constants + _OPEN_LOOP)
        lowest, highest = tl.load(constants + _LOWEST), tl.load(constants + _HIGHEST)
        f = tl.arange(0, _WIDE)
        sum_F = tl.load(sums + s * _COLUMNS + f, mask=f < _COLUMNS, other=0.0)
        steered_level, count = tl.load(level + s), tl.load(steered + s)
        goal = tl.load(numbers + r * _NUMBERS + _TARGET)
        for k in range(accepted):
            row = waiting + k * _COLUMNS
            sum_F += tl.load(row + f, mask=f < _COLUMNS, other=0.0)
            error = (goal - tl.load(row + _AFTER)) / tl.maximum(goal, 0.1)
            moved = tl.minimum(tl.maximum(steered_level + gain * error, lowest), highest)
            counts = tl.load(row + _COUNT) > 0
            steered_level = tl.where(counts, moved, steered_level)
            count += counts.to(tl.int64)
        # 3. Nothing waits any more.
        for k in range(rows_per_request):
            tl.store(waiting + k * _COLUMNS + f, 0.0, mask=f < _COLUMNS)
        tl.store(sums + s * _COLUMNS + f, sum_F, mask=f < _COLUMNS)
        tl.store(level + s, steered_level)
        tl.store(steered + s, count)
        tl.store(tokens + s, tl.load(tokens + s) + accepted)
        # 4. The level of all rows of the request, where its law is `budget`.
        in_force = tl.where(count.to(tl.float32) < open_loop, 0.0, steered_level)
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
        *(*_ANYWHERE, "samples", "valid", "before", "after", "temperature", "changed")
    ],
)
def _stage_step(
    slot,
    position,
    offset,
    samples,
    valid,
    before,
    after,
    temperature,
    changed,
    base,
    waiting,
    invalid,
    rows_per_request,
):
    r = tl.program_id(0)
    s, k = tl.load(slot + r), tl.load(offset + r)
    is_sample, is_valid = tl.load(samples + r) != 0, tl.load(valid + r) != 0
    tl.store(base + s, tl.where(is_sample, tl.load(position + r) - k, _NOTHING_WAITS))
    counts = is_sample & is_valid
    row = waiting + (s * rows_per_request + k) * _COLUMNS
    tl.store(row, counts.to(tl.float32))
    tl.store(row + 1, tl.where(counts, tl.load(before + r), 0.0))
    tl.store(row + 2, tl.where(counts, tl.load(after + r), 0.0))
    tl.store(row + 3, tl.where(counts, tl.load(temperature + r), 0.0))
    tl.store(row + 4, tl.where(counts, tl.load(changed + r), 0.0))
    tl.atomic_add(invalid, 1, mask=is_sample & (is_valid == 0))


@triton.jit(do_not_specialize=["rows_per_request"], do_not_specialize_on_alignment=["order"])
def _open(order, level, steered, tokens, base, sums, waiting, rows_per_request):
    """One program a request that begins: see `Slots._begin`."""
    order += tl.program_id(0) * (2 + _COLUMNS)
    s = tl.load(order).to(tl.int64)
    f = tl.arange(0, _WIDE)
    sum_F = tl.load(order + 2 + f, mask=f < _COLUMNS, other=0.0)
    tl.store(sums + s * _COLUMNS + f, sum_F.to(tl.float32), mask=f < _COLUMNS)
    for k in range(rows_per_request):
        row = waiting + (s * rows_per_request + k) * _COLUMNS
        tl.store(row + f, 0.0, mask=f < _COLUMNS)
    tl.store(tokens + s, tl.load(order + 1).to(tl.int64))
    tl.store(level + s, 0.0)
    tl.store(steered + s, 0)
    tl.store(base + s, _NOTHING_WAITS)
