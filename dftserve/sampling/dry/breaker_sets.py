"""Sets of breakers on the device, one row for each set in use. A new set is sent once; later
requests with the same set reuse its row until the row is given to another set."""

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dftserve.sampling.staging import PinnedStaging

Mask = NDArray[np.bool_]
Packed = NDArray[np.uint8]


class BreakerSets:
    """Sets are compared by object identity, as returned by `Breakers.tokens`, and must not be
    changed."""

    def __init__(self, staging: PinnedStaging) -> None:
        self._staging = staging
        self._rows_BX: Tensor | None = None
        self._set_of_row: list[Mask] = []
        self._row_of_set: dict[int, int] = {}
        self._row_of_slot: dict[int, int] = {}
        self._users: list[int] = []
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Rows without a user, least recently used first."""
        self._new: dict[int, Packed] = {}

    def take(self, slot: int, breaks_V: Mask) -> int:
        """The row of a request's set, which is assigned to the slot until `leave`."""
        row = self._row_of_set.get(id(breaks_V))
        if row is None:
            row = self._add(breaks_V)
        self._unused.pop(row, None)
        self._users[row] += 1
        self._row_of_slot[slot] = row
        return row

    def _add(self, breaks_V: Mask) -> int:
        if self._unused:
            row, _ = self._unused.popitem(last=False)
            del self._row_of_set[id(self._set_of_row[row])]
            self._set_of_row[row] = breaks_V
        else:
            row = len(self._set_of_row)
            self._set_of_row.append(breaks_V)
            self._users.append(0)
        self._row_of_set[id(breaks_V)] = row
        self._new[row] = np.packbits(breaks_V, bitorder="little")
        return row

    def leave(self, slot: int) -> None:
        """Release the row of a slot whose request has ended."""
        row = self._row_of_slot.pop(slot)
        self._users[row] -= 1
        if not self._users[row]:
            self._unused[row] = None

    def on_device(self) -> Tensor:
        """uint8 [B, X], one bit for each token, lowest bit first."""
        width = max(map(len, self._new.values()), default=0)
        rows_BX = self._resized(len(self._set_of_row), width)
        if self._new:
            new_NX = np.zeros((len(self._new), rows_BX.shape[1]), np.uint8)
            for row_X, packed in zip(new_NX, self._new.values(), strict=True):
                row_X[: len(packed)] = packed
            row_N, sent_NX = self._staging.to_device_together(
                np.array(list(self._new), np.int64), new_NX
            )
            rows_BX.index_copy_(0, row_N, sent_NX)
            self._new.clear()
        return rows_BX

    def _resized(self, rows: int, width: int) -> Tensor:
        """The matrix, enlarged if necessary."""
        former_BX = self._rows_BX
        if former_BX is None:
            former_BX = self._staging.to_device(np.zeros((1, 1), np.uint8))
        rows_BX, (had, was_wide) = former_BX, former_BX.shape
        if rows > had or width > was_wide:
            rows = had if rows <= had else max(rows, 2 * had)
            rows_BX = former_BX.new_zeros((rows, max(width, was_wide)))
            rows_BX[:had, :was_wide] = former_BX
        self._rows_BX = rows_BX
        return rows_BX
