"""The controls of an engine's requests, one row per slot, on the host and on the device."""

import numpy as np
import torch

from dftserve.sampling.controls import LAW, NO_LAW, NUMBERS, ControlRow, Controls, stop_width
from dftserve.sampling.staging import PinnedStaging


class SlotControls:
    """Rows are changed on the host as requests start and end. At the first step after a change, all
    rows are sent to the device in one non-blocking copy; steps without a change send nothing."""

    def __init__(
        self, slots: int, device: torch.device | str, staging: PinnedStaging | None = None
    ) -> None:
        """`staging`: an existing one for this device; None creates one."""
        self._staging = staging or PinnedStaging(device)
        self._numbers_SF = np.ones((slots, len(NUMBERS)), dtype=np.float32)
        self._numbers_SF[:, LAW] = NO_LAW
        self._stop_ids_SE = np.full((slots, 1), -1)
        self._width_S = np.ones(slots, dtype=np.int64)
        self._sent: Controls | None = None

    def put(self, slot: int, row: ControlRow) -> None:
        """Store a request's row."""
        width = stop_width([row])
        missing = width - self._stop_ids_SE.shape[1]
        if missing > 0:
            padding = ((0, 0), (0, missing))
            self._stop_ids_SE = np.pad(self._stop_ids_SE, padding, constant_values=-1)
        self._sent = None
        self._numbers_SF[slot] = row.numbers
        self._stop_ids_SE[slot] = row.padded_stops(self._stop_ids_SE.shape[1])
        self._width_S[slot] = width

    def clear(self, slot: int) -> None:
        """Mark the slot as empty; the transform leaves its rows unchanged."""
        if self._numbers_SF[slot, LAW] != NO_LAW:
            self._sent = None
            self._numbers_SF[slot, LAW] = NO_LAW
            self._stop_ids_SE[slot] = -1
            self._width_S[slot] = 1

    def on_device(self) -> Controls:
        """The current controls of all slots, with only as many columns of stop tokens as their
        requests need. A request that ended without `clear` is included until its slot is reused;
        this only makes the copy larger, since a row reads no more than its own stop tokens."""
        if self._sent is None:
            stop_ids_SE = self._stop_ids_SE[:, : self._width_S.max()]
            numbers_SF, stop_ids_SE = self._staging.to_device_together(
                self._numbers_SF, np.ascontiguousarray(stop_ids_SE)
            )
            self._sent = Controls(numbers_SF, stop_ids_SE)
        return self._sent
