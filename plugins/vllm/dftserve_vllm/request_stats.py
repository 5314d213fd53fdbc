"""The worker's side that both runners share: one guarded call of the transform, and the figures.

An exception in a logits processor kills vLLM's engine and every request in flight. Here a fault
leaves the step's rows as they came, is counted, and is logged once.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dftserve.sampling import Account, Controls, fastest, fastest_slots, transform

logger = logging.getLogger("vllm.dftserve")

MAX_FINISHED = 4096
"""Figures of finished requests kept for an answer that has not asked yet."""


class RequestStats:
    """Figures by slot while a request runs, by its identity once it has left its slot."""

    def __init__(self, capacity: int, rows_per_request: int, device: torch.device) -> None:
        self.slots = fastest_slots(capacity, rows_per_request, device)
        self.faults = 0
        self._way = fastest(device)
        self._identity: dict[int, str | None] = {}
        self._slot: dict[str, int] = {}
        self._finished: OrderedDict[str, Account] = OrderedDict()

    def open(self, slot: int, identity: str | None, produced: int) -> None:
        """A request enters a slot; `produced` tokens are there already if it was preempted."""
        self.close(slot)
        resumed = None
        if identity is not None:
            if (old := self._slot.get(identity)) is not None:
                self.close(old)
            resumed = self._finished.pop(identity, None)
            self._slot[identity] = slot
        self._identity[slot] = identity
        self.slots.open(slot, resumed, produced)

    def close(self, slot: int) -> None:
        """The slot's request has left it: its figures wait for the answer."""
        identity = self._identity.pop(slot, None)
        if identity is None:
            return
        del self._slot[identity]
        self._finished[identity] = self.slots.account(slot)
        while len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    def take(self, produced: Mapping[str, int]) -> dict[str, Any]:
        """Figures of finished requests by identity, and the counters.

        `produced` says how many tokens each of them produced. A request whose figures are not
        known here is left out.
        """
        figures = {}
        for identity, tokens in produced.items():
            account = self._finished.pop(identity, None)
            if account is None and (slot := self._slot.get(identity)) is not None:
                account = self.slots.account(slot)
                self._identity[slot] = None
                del self._slot[identity]
            if account is not None:
                figures[identity] = account.means(tokens)
        return {"figures": figures, "faults": self.faults, "nan_rows": int(self.slots.unsound)}

    def apply(
        self,
        logits_XV: Tensor,
        controls: Controls,
        rows_R: Tensor | None,
        *,
        slot_R: Tensor,
        position_R: Tensor,
        offset_R: Tensor,
        samples_R: Tensor,
    ) -> None:
        """Transform the rows in place; if it raises, they are as they were.

        Args:
            rows_R: which rows of the logits; None for all, in order.
            slot_R, position_R, offset_R: see `Slots.settle`.
            samples_R: bool, False where the row is a chunk of a prompt.
        """
        controls = self.slots.settle(controls, slot_R, position_R, offset_R)
        statistics = transform(logits_XV, controls, rows_R, self._way)
        self.slots.remember(slot_R, position_R, offset_R, samples_R, statistics)

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Whatever goes wrong in here is counted, logged once, and goes no further."""
        try:
            yield
        except Exception:  # Whatever it is, it must not end the engine.
            if not self.faults:
                logger.exception(
                    "diversity: a fault; what it concerns passes through unchanged. "
                    "Further faults are only counted (dft:faults_total)."
                )
            self.faults += 1
