"""Slots on a GPU. A step updates them inside the transform's kernels, which call `settle` and
`stage_row`; the only separate launch initialises the slots of all new requests."""

# Type checkers cannot analyse Triton kernels.
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
"""Launch options of every kernel: without fused operations, a product has the same bits in all
kernels, so that ties between tokens remain ties."""


class TritonSlots(Slots):
    """`Slots` that are initialised in one launch. Slots and offsets are not checked, since that
    would block; they must be in range."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str,
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        super().__init__(slots, rows_per_request, device, constants)
        self.nothing_known_S = torch.zeros(slots, dtype=torch.int32, device=device)
        """`Step.known_S` for a step in which every row is sampled."""

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


# Globals that a kernel reads must be constexpr.
_COUNT, _AFTER = tl.constexpr(slots.COUNT), tl.constexpr(slots.AFTER)
_COLUMNS, _KL = tl.constexpr(slots.COLUMNS), tl.constexpr(slots.KL)
_STYLE_STATS = tl.constexpr(slots.COLUMNS - slots.KL)
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
    """`Slots.commit_accepted` for one request: `position` is that of its first row, `numbers` its
    own controls. One program per request: no other may access its slot in the same launch."""
    level, steered, tokens, base, sums, waiting = state
    waiting += s * rows_per_request * _COLUMNS
    # 1. How many of the slot's waiting rows were accepted.
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
    # 3. Clear the waiting rows.
    tl.debug_barrier()  # All threads have read them.
    for k in range(rows_per_request):
        tl.store(waiting + k * _COLUMNS + f, 0.0, mask=f < _COLUMNS)
    tl.store(sums + s * _COLUMNS + f, sum_F, mask=f < _COLUMNS)
    tl.store(level + s, steered_level)
    tl.store(steered + s, count)
    tl.store(tokens + s, tl.load(tokens + s) + accepted)


@triton.jit
def level_in_force(s, numbers, constants, level, steered):
    """The level of a request's rows; under the law `budget`, the current steered level."""
    is_closed = tl.load(steered + s).to(tl.float32) >= tl.load(constants + _OPEN_LOOP)
    steered_level = tl.where(is_closed, tl.load(level + s), 0.0)
    is_budget = tl.load(numbers + _LAW) == _BUDGET
    return tl.where(is_budget, steered_level, tl.load(numbers + _LEVEL))


@triton.jit
def stage_row(
    state, s, k, position, samples, valid, statistics, style_stats, has_styles, rows_per_request
):
    """`Slots.stage_step` for one row, the k-th of its request."""
    base, waiting, invalid = state
    before, after, temperature, changed = statistics
    # All rows of a request write the same value here.
    tl.store(base + s, tl.where(samples, position - k, _NOTHING_WAITS))
    counts = samples & valid
    row = waiting + (s * rows_per_request + k) * _COLUMNS
    tl.store(row, counts.to(tl.float32))
    tl.store(row + 1, tl.where(counts, before, 0.0))
    tl.store(row + 2, tl.where(counts, after, 0.0))
    tl.store(row + 3, tl.where(counts, temperature, 0.0))
    tl.store(row + 4, tl.where(counts, changed, 0.0))
    f = tl.arange(0, _STYLE_STATS)
    style_stats_F = tl.load(style_stats + f, mask=f < has_styles * _STYLE_STATS, other=0.0)
    tl.store(row + _KL + f, tl.where(counts, style_stats_F, 0.0))
    tl.atomic_add(invalid, 1, mask=samples & (valid == 0))


@triton.jit(do_not_specialize=["rows_per_request"], do_not_specialize_on_alignment=["order"])
def _open(order, level, steered, tokens, base, sums, waiting, rows_per_request):
    """`Slots._begin`, with one program per new request."""
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
