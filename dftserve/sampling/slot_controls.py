"""The controls of an engine's requests, one row a slot, on the host and on the device."""

import numpy as np
import torch

from dftserve.sampling.controls import LAW, NO_LAW, NUMBERS, ControlRow, Controls, stop_width
from dftserve.sampling.staging import PinnedStaging


class SlotControls:
    """Rows are changed on the host as requests come and go; the device gets all of them by one
    copy, without a wait, at the first step after a change. No step without a change sends any."""

    def __init__(
        self, slots: int, device: torch.device | str, staging: PinnedStaging | None = None
    ) -> None:
        """`staging`: of this device, where the caller has one."""
        self._staging = staging or PinnedStaging(device)
        self._numbers_SF = np.ones((slots, len(NUMBERS)), dtype=np.float32)
        self._numbers_SF[:, LAW] = NO_LAW
        self._stop_ids_SE = np.full((slots, 1), -1)
        self._width_S = np.ones(slots, dtype=np.int64)
        self._sent: Controls | None = None

    def put(self, slot: int, row: ControlRow) -> None:
        """A request's row."""
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
        """The slot holds no request: rows that are said to be its own keep their bits."""
        if self._numbers_SF[slot, LAW] != NO_LAW:
            self._sent = None
            self._numbers_SF[slot, LAW] = NO_LAW
            self._stop_ids_SE[slot] = -1
            self._width_S[slot] = 1

    def on_device(self) -> Controls:
        """Of all slots, as they are now; no wider than the requests in them need. One that left
        without `clear` counts until its slot is used again, in the size of a copy alone: a row
        reads its own stop tokens, however many columns there are."""
        if self._sent is None:
            stop_ids_SE = self._stop_ids_SE[:, : self._width_S.max()]
            numbers_SF, stop_ids_SE = self._staging.to_device_together(
                self._numbers_SF, np.ascontiguousarray(stop_ids_SE)
            )
            self._sent = Controls(numbers_SF, stop_ids_SE)
        return self._sent
