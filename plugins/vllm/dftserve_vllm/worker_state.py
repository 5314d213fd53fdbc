"""One engine's state in its worker: the guarded transform, and each request's statistics.

An exception in a logits processor ends vLLM's engine and every request in flight. Here, a fault
leaves the affected rows unchanged, is counted, and is logged the first time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dftserve.sampling import (
    SlotStatistics,
    Step,
    TokenClasses,
    get_backend,
    get_style_stage,
    transform_step,
)
from dftserve.sampling.group import GroupRow
from dftserve.sampling.style import ProfileArrays
from dftserve_vllm.groups import Codes
from dftserve_vllm.log import logger
from dftserve_vllm.preempted import PreemptedStates
from dftserve_vllm.step_report import Array, PendingReport


class WorkerState:
    """Statistics by slot while a request runs, by identity while it is preempted."""

    def __init__(
        self,
        capacity: int,
        rows_per_request: int,
        device: torch.device,
        token_classes: TokenClasses | None = None,
        profiles: Sequence[ProfileArrays] = (),
    ) -> None:
        self._backend = get_backend(device, token_classes=token_classes)
        self._style_stage = get_style_stage(device, profiles) if profiles else None
        self.slots = self._backend.create_slots(capacity, rows_per_request)
        self._codes = Codes(capacity, rows_per_request, device)
        self.faults = 0
        self._preempted = PreemptedStates[NDArray[np.float32]]()
        self._report: PendingReport | None = None
        self._reported_faults = 0

    def open(
        self, slot: int, identity: str | None, produced: int, group: GroupRow | None = None
    ) -> None:
        """A request enters a slot.

        Args:
            identity: identifies the request; None if its statistics are not needed.
            produced: how many tokens it has already; more than 0 if it was preempted.
            group: the request's settings if it is drawn as one of a group.
        """
        self.close(slot)
        if identity is not None and (old := self._preempted.slot(identity)) is not None:
            self.close(old)
        left_X = self._preempted.enter(slot, identity, produced)
        resumed = None if left_X is None else SlotStatistics.of_row(left_X)
        self.slots.open(slot, resumed, produced)
        if group is not None:
            self._codes.open(slot, group, identity, produced)

    def close(self, slot: int) -> None:
        """The slot's request has left: it has ended, or was preempted."""
        self._codes.close(slot)
        self._preempted.leave(slot)

    def drawn_by_code(self, slots_R: Array) -> NDArray[np.bool_]:
        """bool [R]: for which of these slots the next token is drawn by a group's code."""
        return self._codes.draws(slots_R)

    def apply(self, logits_XV: Tensor, step: Step, most_group_rows: int = 0) -> None:
        """Transform the rows in place. If it raises, they are unchanged, except for a style that
        was already applied, before the law.

        Args:
            most_group_rows: upper bound on the rows of slots that are drawn by code.
        """
        transform_step(logits_XV, step, self.slots, self._backend, self._style_stage)
        if most_group_rows:
            self._codes.draw(logits_XV, step, most_group_rows)

    def end_step(
        self, positions: Array, slots: Array, reports_each_step: NDArray[np.bool_]
    ) -> None:
        """Prepare the report of the step's active requests.

        Args:
            positions: each active request's position in the batch.
            slots: their slots.
            reports_each_step: whether its row is sent at every step; see `StepReport`.
        """
        snapshot = self.slots.snapshot()
        self._preempted.record(snapshot)
        self._report = PendingReport(positions, reports_each_step, slots, snapshot, self.faults)

    def take_report(self) -> PendingReport | None:
        """The report of the last sampled step; each is returned only once."""
        report, self._report = self._report, None
        if report is None and self.faults > self._reported_faults:
            none = np.empty(0, np.int64)
            report = PendingReport(
                none, none.astype(bool), none, self.slots.snapshot(), self.faults
            )
        self._reported_faults = self.faults
        return report

    def isolated(self, otherwise: Callable[[], None] | None = None) -> "_Isolated":
        """Suppress exceptions in the block; each is counted, and the first is logged.

        Args:
            otherwise: called after a fault, to restore a state in which rows stay unchanged.
        """
        return _Isolated(self, otherwise)


class _Isolated:
    """A class, because every step enters several and a generator takes three times as long."""

    __slots__ = ("_otherwise", "_state")

    def __init__(self, state: WorkerState, otherwise: Callable[[], None] | None) -> None:
        self._state, self._otherwise = state, otherwise

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        # No exception may end the engine.
        if not self._state.faults:
            logger.error(
                "diversity: a fault; the affected rows stay unchanged. "
                "Further faults are only counted (dft:faults_total).",
                exc_info=error,
            )
        self._state.faults += 1
        if self._otherwise is not None:
            self._otherwise()
        return True
