"""Statistics and steering state between steps: one slot for each request, on the rows' device.

Some rows of a step do not yield a token: chunks of a prompt, and rejected drafts of speculative
decoding. A row's statistics are therefore staged until the request's position shows that its token
was accepted; only then are they committed and used by the `budget` law for steering. Staged rows
are called waiting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dftserve.sampling.controls import DEFAULT_CONSTANTS, LAW_CODES, Controls, LawConstants
from dftserve.sampling.host_copy import HostCopy
from dftserve.sampling.laws import steer
from dftserve.sampling.staging import ALIGNMENT, PinnedStaging
from dftserve.sampling.transform import Statistics

Array = np.ndarray[Any, Any]

COUNT, BEFORE, AFTER, TEMPERATURE, CHANGED, KL, TILT_KL, HELD_BACK, STRENGTH = range(9)
"""The columns F: 1 for a valid row, the four statistics of `transform`, and the four of a style
(`style.stage`), which are 0 for rows without a style."""
COLUMNS = 9

NOTHING_WAITS = 2**62
"""The position of the first waiting row in a slot without any; greater than every position."""


@dataclass(frozen=True)
class SlotStatistics:
    """A copy of one slot's statistics: sums over accepted tokens, and the rows still waiting."""

    tokens: Tensor
    """int64 [], accepted tokens so far."""
    sums_F: Tensor
    waiting_KF: Tensor

    @classmethod
    def of_row(cls, row_X: Array) -> "SlotStatistics":
        """From a row of `Snapshot.rows`."""
        rest_XF = torch.from_numpy(row_X[1:]).view(-1, COLUMNS)
        return cls(torch.tensor(int(row_X[0])), rest_XF[0], rest_XF[1:])

    def means(self, total_tokens: int | None = None) -> list[float] | None:
        """See `means`; without a total, all waiting rows are included."""
        tokens = int(self.tokens)
        total = tokens + len(self.waiting_KF) if total_tokens is None else total_tokens
        return means(tokens, self.sums_F.tolist(), self.waiting_KF.tolist(), total)


def means(
    tokens: int,
    sums_F: Sequence[float],
    waiting_KF: Sequence[Sequence[float]],
    total_tokens: int,
) -> list[float] | None:
    """The number of counted tokens, followed by the mean of each other column over them.

    Args:
        tokens, sums_F, waiting_KF: as in `SlotStatistics`.
        total_tokens: the total number of tokens that the request produced. The first
            `total_tokens - tokens` waiting rows are included.

    Returns:
        Entropies in nats; None if no token was counted.
    """
    rows = [sums_F, *waiting_KF[: max(total_tokens - tokens, 0)]]
    count, *sums = (sum(column) for column in zip(*rows, strict=True))
    return [count, *(each / count for each in sums)] if count else None


@dataclass(frozen=True)
class StatisticsLayout:
    """The layout of all slots' statistics in one block of memory, so that one copy transfers them
    all; each part is aligned so that kernels can load 16 bytes at once."""

    slots: int
    rows_per_request: int

    @cached_property
    def _parts(self) -> list[tuple[str, tuple[int, ...], slice]]:
        """The dtype, shape and byte range of invalid, tokens_S, sums_SF and waiting_SKF."""
        columns, begin, parts = COLUMNS, 0, []
        for dtype, shape in (
            ("int64", ()),
            ("int64", (self.slots,)),
            ("float32", (self.slots, columns)),
            ("float32", (self.slots, self.rows_per_request, columns)),
        ):
            end = begin + np.dtype(dtype).itemsize * math.prod(shape)
            parts.append((dtype, shape, slice(begin, end)))
            begin = -(-end // ALIGNMENT) * ALIGNMENT
        return parts

    def zeros(self, device: torch.device | str) -> Tensor:
        """A block of zeros, uint8."""
        _, _, last = self._parts[-1]
        return torch.zeros(last.stop, dtype=torch.uint8, device=device)

    def tensors(self, block: Tensor) -> list[Tensor]:
        """The parts of a block, as views of it."""
        parts = ((block[part], dtype, shape) for dtype, shape, part in self._parts)
        return [part.view(getattr(torch, dtype)).view(shape) for part, dtype, shape in parts]

    def arrays(self, block: Array) -> list[Array]:
        """As `tensors`, for a block on the host."""
        parts = ((block[part], dtype, shape) for dtype, shape, part in self._parts)
        return [part.view(dtype).reshape(shape) for part, dtype, shape in parts]


@dataclass(frozen=True)
class Snapshot:
    """All slots' statistics at the end of one step, on the host: see `SlotStatistics`."""

    layout: StatisticsLayout
    copy: HostCopy
    """The copy of the block; nothing below may be read before the transfer is complete."""

    @cached_property
    def _arrays(self) -> list[Array]:
        return self.layout.arrays(self.copy.array)

    @property
    def invalid(self) -> int:
        """The number of sampled rows that were invalid, over all requests since the start."""
        return int(self._arrays[0])

    def rows(self, slots_R: Array) -> Array:
        """float32 [R, 1 + F + K·F], for these slots (int64): tokens, sums, waiting rows."""
        _, tokens_S, sums_SF, waiting_SKF = self._arrays
        waiting_SX = waiting_SKF.reshape(len(tokens_S), -1)
        parts = (tokens_S[:, None].astype(np.float32), sums_SF, waiting_SX)
        return np.concatenate([part.take(slots_R, axis=0) for part in parts], axis=1)

    def read(self, slot: int) -> Array:
        """A copy of one slot's row of `rows`. It is an array, not a tensor, because thousands are
        kept: each tensor takes a kilobyte and is scanned by Python's garbage collector."""
        return self.rows(np.array([slot]))[0].copy()


def last_tokens_of_row(row_X: Sequence[float], tokens: int) -> list[Sequence[float] | None]:
    """The columns F of each token produced by a step, from the row of `Snapshot.rows` reported for
    it; None for a token whose logits were left unchanged."""
    first, rows = 1 + COLUMNS, max(len(row_X) // COLUMNS - 1, 0)
    waiting = [row_X[first + i * COLUMNS :][:COLUMNS] for i in range(min(tokens, rows))]
    known = [row_F if row_F[COUNT] else None for row_F in waiting]
    return known + [None] * (tokens - len(known))


def means_of_row(row_X: Sequence[float], total_tokens: int) -> list[float] | None:
    """`means`, from a row of `Snapshot.rows`."""
    tokens, *rest = row_X
    sums_F, *waiting_KF = (rest[i : i + COLUMNS] for i in range(0, len(rest), COLUMNS))
    return means(int(tokens), sums_F, waiting_KF, total_tokens)


class Slots:
    """Statistics and steering state of up to `slots` requests, each with up to `rows_per_request`
    rows per step."""

    def __init__(
        self,
        slots: int,
        rows_per_request: int,
        device: torch.device | str,
        constants: LawConstants = DEFAULT_CONSTANTS,
    ) -> None:
        self._constants = constants
        self.rows_per_request = rows_per_request
        self._layout = StatisticsLayout(slots, rows_per_request)
        self._block = self._layout.zeros(device)
        parts = self._layout.tensors(self._block)
        self.invalid, self._tokens_S, self._sums_SF, self._waiting_SKF = parts
        self._level_S = torch.zeros(slots, device=device)
        self._steered_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._base_S = torch.full((slots,), NOTHING_WAITS, device=device)
        counters = (self._level_S, self._steered_S, self._tokens_S, self._base_S)
        self._state = (*counters, self._sums_SF, self._waiting_SKF, self.invalid)
        self._index_K = torch.arange(rows_per_request, device=device)
        self._staging = PinnedStaging(device)
        self._opened: dict[int, tuple[float, ...]] = {}

    def open(self, slot: int, resumed: SlotStatistics | None = None, produced: int = 0) -> None:
        """Begin a request in a slot; the controller starts open-loop, also after a preemption.

        This only records the request. The next call of another method initialises all recorded
        slots in one copy to the device and, on a GPU, one launch, neither of which blocks. If a
        slot is opened twice, the later request counts.

        Args:
            resumed: the request's statistics from when it was preempted, which are continued. They
                should be on the host, as those of `Snapshot.read`: reading others blocks.
            produced: the number of tokens known to have been accepted before.

        Raises:
            IndexError: there is no such slot.
        """
        if not 0 <= slot < len(self._level_S):
            raise IndexError(f"slot: got {slot}; accepted: 0 to {len(self._level_S) - 1}.")
        sums_F = [0.0] * COLUMNS
        if resumed is not None:
            missing = max(produced - int(resumed.tokens), 0)
            sums_F = (resumed.sums_F + resumed.waiting_KF[:missing].sum(dim=0)).tolist()
        self._opened[slot] = (slot, produced, *sums_F)

    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a backend's kernels read and write: level_S, steered_S, tokens_S,
        base_S, sums_SF, waiting_SKF, invalid."""
        self._flush()
        return self._state

    def _flush(self) -> None:
        """Initialise the slots opened since the last call."""
        if self._opened:
            # One array for one copy: float64 represents slots and token counts exactly.
            order_NX = np.array(list(self._opened.values()), dtype=np.float64)
            self._opened.clear()
            self._begin(self._staging.to_device(order_NX))

    def _begin(self, order_NX: Tensor) -> None:
        """`order_NX`: float64, each request's slot, number of tokens and sums F."""
        slot_N = order_NX[:, 0].long()
        self._tokens_S.index_copy_(0, slot_N, order_NX[:, 1].long())
        self._sums_SF.index_copy_(0, slot_N, order_NX[:, 2:].float())
        self._waiting_SKF.index_fill_(0, slot_N, 0.0)
        self._level_S.index_fill_(0, slot_N, 0.0)
        self._steered_S.index_fill_(0, slot_N, 0)
        self._base_S.index_fill_(0, slot_N, NOTHING_WAITS)

    def read(self, slot: int) -> SlotStatistics:
        """A copy of a slot's statistics on the device; does not block."""
        self._flush()
        return SlotStatistics(
            self._tokens_S[slot].clone(),
            self._sums_SF[slot].clone(),
            self._waiting_SKF[slot].clone(),
        )

    def snapshot(self) -> "Snapshot":
        """A copy of all slots' statistics on the host; from a GPU it is asynchronous."""
        self._flush()
        return Snapshot(self._layout, HostCopy.of(self._block))

    def commit_accepted(
        self, controls: Controls, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> Controls:
        """Commit the staged rows whose tokens were accepted, and steer by them.

        Args:
            controls: of each row, including the target entropies.
            slot_R: int64, each row's slot. All of a request's rows in the step, and adjacent.
            position_R: int64, each row's position in its sequence.
            offset_R: int64, each row's index among the rows of its request in this step.

        Returns:
            The controls, with the current level for rows of the law `budget`.
        """
        self._flush()
        accepted_R, counted_RKF = self._accepted(slot_R, position_R, offset_R)
        # These values are equal for all rows of a request, so it does not matter which writes last.
        sums_RF = self._sums_SF.index_select(0, slot_R) + counted_RKF.sum(dim=1)
        self._sums_SF.index_copy_(0, slot_R, sums_RF)
        tokens_R = self._tokens_S.index_select(0, slot_R) + accepted_R
        self._tokens_S.index_copy_(0, slot_R, tokens_R)
        self._waiting_SKF.index_fill_(0, slot_R, 0.0)
        return self._steered(controls, slot_R, counted_RKF)

    def _accepted(
        self, slot_R: Tensor, position_R: Tensor, offset_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The number of accepted waiting rows of each row's request, and those rows, with 0 for
        rows that were not accepted."""
        passed_R = position_R - offset_R - self._base_S.index_select(0, slot_R)
        accepted_R = passed_R.clamp(0, len(self._index_K))
        counted_RK = self._index_K < accepted_R[:, None]
        waiting_RKF = self._waiting_SKF.index_select(0, slot_R)
        return accepted_R, torch.where(counted_RK[:, :, None], waiting_RKF, 0.0)

    def sums_before(self, slot_R: Tensor, position_R: Tensor, offset_R: Tensor) -> Tensor:
        """float32 [R, F]: the sums over all tokens accepted before this step, which
        `commit_accepted` will store; does not change the state."""
        self._flush()
        _, counted_RKF = self._accepted(slot_R, position_R, offset_R)
        return self._sums_SF.index_select(0, slot_R) + counted_RKF.sum(dim=1)

    def _steered(self, controls: Controls, slot_R: Tensor, counted_RKF: Tensor) -> Controls:
        level_R = self._level_S.index_select(0, slot_R)
        steered_R = self._steered_S.index_select(0, slot_R)
        for row_RF in counted_RKF.unbind(dim=1):
            counts_R = row_RF[:, COUNT] > 0
            next_R = steer(level_R, controls.target_entropy_R, row_RF[:, AFTER], self._constants)
            level_R = torch.where(counts_R, next_R, level_R)
            steered_R = steered_R + counts_R
        self._level_S.index_copy_(0, slot_R, level_R)
        self._steered_S.index_copy_(0, slot_R, steered_R)
        level_R = torch.where(steered_R < self._constants.budget_open_loop, 0.0, level_R)
        is_budget_R = controls.law_R == LAW_CODES["budget"]
        return controls.with_level(torch.where(is_budget_R, level_R, controls.level_R))

    def stage_step(
        self,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
        statistics: Statistics,
        style_stats_RF: Tensor | None = None,
    ) -> None:
        """Stage this step's statistics, and those of its styles if there are any.
        `samples_R`: bool, False for a chunk of a prompt."""
        self._flush()
        values_RF = torch.stack((statistics.valid_R.float(), *statistics.values()), dim=1)
        if style_stats_RF is None:
            style_stats_RF = values_RF.new_zeros(len(values_RF), COLUMNS - KL)
        values_RF = torch.cat((values_RF, style_stats_RF), dim=1)
        counts_R1 = (samples_R & statistics.valid_R)[:, None]
        waiting_XF = self._waiting_SKF.view(-1, COLUMNS)
        index_R = slot_R * len(self._index_K) + offset_R
        waiting_XF.index_copy_(0, index_R, torch.where(counts_R1, values_RF, 0.0))
        base_R = torch.where(samples_R, position_R - offset_R, NOTHING_WAITS)
        self._base_S.index_copy_(0, slot_R, base_R)
        self.invalid += (samples_R & ~statistics.valid_R).sum()
