"""Slots on a GPU. What a step does to them is part of the transform's own launches: `settle` and
`remember` are called by its kernels, and only requests that begin take a launch, one for all."""

# Kernels are Triton, not Python, to a type checker's eye.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from dftserve.sampling import controls as columns
from dftserve.sampling import slots
from dftserve.sampling.controls import DEFAULT_CONSTANTS, LAW_CODES, LawConstants
from dftserve.sampling.slots import Slots

EXACT = {"enable_fp_fusion": False}
"""Launch options of every kernel: the same product has the same bits in all of them, since ties
between tokens must stay ties."""


class TritonSlots(Slots):
    """`Slots` whose requests begin by one launch; nothing waits for the host, so no slot and no
    offset is checked: they are within what there is room for."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str,
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        super().__init__(slots, rows_per_request, device, constants)
        self.nothing_known_S = torch.zeros(slots, dtype=torch.int32, device=device)
        """As `Step.known_S`, where every row samples."""

    def _begin(self, order_NX: Tensor) -> None:
        """As `Slots._begin`."""
        with torch.cuda.device_of(order_NX):
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


# What a kernel reads from outside has to be marked so.
_COUNT, _AFTER = tl.constexpr(slots.COUNT), tl.constexpr(slots.AFTER)
_COLUMNS, _KL = tl.constexpr(slots.COLUMNS), tl.constexpr(slots.KL)
_FIGURES = tl.constexpr(slots.COLUMNS - slots.KL)
_WIDE = tl.constexpr(triton.next_power_of_2(slots.COLUMNS))
_NOTHING_WAITS = tl.constexpr(slots.NOTHING_WAITS)
_LAW, _LEVEL = tl.constexpr(columns.LAW), tl.constexpr(columns.LEVEL)
_TARGET = tl.constexpr(columns.TARGET_ENTROPY)
_BUDGET = tl.constexpr(LAW_CODES["budget"])
_GAIN = tl.constexpr(columns.BUDGET_GAIN)
_LOWEST = tl.constexpr(columns.BUDGET_LOWEST_LEVEL)
_HIGHEST = tl.constexpr(columns.BUDGET_HIGHEST_LEVEL)
_OPEN_LOOP = tl.constexpr(columns.BUDGET_OPEN_LOOP)


@triton.jit
def settle(state, s, position, numbers, constants, rows_per_request):
    """`Slots.commit_accepted` of one request: `position` is that of its first row, `numbers` its
    own controls. One program a request: no other may touch its slot in the same launch."""
    level, steered, tokens, base, sums, waiting = state
    waiting += s * rows_per_request * _COLUMNS
    # 1. How many of the rows that wait in the slot were accepted since.
    accepted = tl.minimum(tl.maximum(position - tl.load(base + s), 0), rows_per_request)
    # 2. Add them up, and steer by each.
    gain, goal = tl.load(constants + _GAIN), tl.load(numbers + _TARGET)
    lowest, highest = tl.load(constants + _LOWEST), tl.load(constants + _HIGHEST)
    f = tl.arange(0, _WIDE)
    sum_F = tl.load(sums + s * _COLUMNS + f, mask=f < _COLUMNS, other=0.0)
    steered_level, count = tl.load(level + s), tl.load(steered + s)
    for k in range(accepted):
        row = waiting + k * _COLUMNS
        sum_F += tl.load(row + f, mask=f < _COLUMNS, other=0.0)
        error = (goal - tl.load(row + _AFTER)) / tl.maximum(goal, 0.1)
        moved = tl.minimum(tl.maximum(steered_level + gain * error, lowest), highest)
        counts = tl.load(row + _COUNT) > 0
        steered_level = tl.where(counts, moved, steered_level)
        count += counts.to(tl.int64)
    # 3. Nothing waits any more.
    tl.debug_barrier()  # Every thread has read what waited.
    for k in range(rows_per_request):
        tl.store(waiting + k * _COLUMNS + f, 0.0, mask=f < _COLUMNS)
    tl.store(sums + s * _COLUMNS + f, sum_F, mask=f < _COLUMNS)
    tl.store(level + s, steered_level)
    tl.store(steered + s, count)
    tl.store(tokens + s, tl.load(tokens + s) + accepted)


@triton.jit
def level_in_force(s, numbers, constants, level, steered):
    """The level of a request's rows, as steered so far where its law is `budget`."""
    is_closed = tl.load(steered + s).to(tl.float32) >= tl.load(constants + _OPEN_LOOP)
    steered_level = tl.where(is_closed, tl.load(level + s), 0.0)
    is_budget = tl.load(numbers + _LAW) == _BUDGET
    return tl.where(is_budget, steered_level, tl.load(numbers + _LEVEL))


@triton.jit
def remember(
    state, s, k, position, samples, valid, statistics, figures, has_figures, rows_per_request
):
    """`Slots.stage_step` of one row, the k-th of its request."""
    base, waiting, invalid = state
    before, after, temperature, changed = statistics
    # The rows of a request agree on what is written here.
    tl.store(base + s, tl.where(samples, position - k, _NOTHING_WAITS))
    counts = samples & valid
    row = waiting + (s * rows_per_request + k) * _COLUMNS
    tl.store(row, counts.to(tl.float32))
    tl.store(row + 1, tl.where(counts, before, 0.0))
    tl.store(row + 2, tl.where(counts, after, 0.0))
    tl.store(row + 3, tl.where(counts, temperature, 0.0))
    tl.store(row + 4, tl.where(counts, changed, 0.0))
    f = tl.arange(0, _FIGURES)
    figure_F = tl.load(figures + f, mask=f < has_figures * _FIGURES, other=0.0)
    tl.store(row + _KL + f, tl.where(counts, figure_F, 0.0))
    tl.atomic_add(invalid, 1, mask=samples & (valid == 0))


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
