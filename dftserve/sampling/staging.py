"""Non-blocking copies of small host arrays to a device, through pinned memory.

A copy from pageable memory makes the host wait for the device. A copy from pinned memory does not,
so the pinned buffer must not be changed until the device has read it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.generic] | list[int]

ALIGNMENT = 16
"""Bytes; see `to_device_together`."""
SMALLEST = 4096
"""Minimum size of a pinned buffer in bytes; large enough for most copies of a step."""


class Transport(Protocol):
    """How `PinnedStaging` copies to a device; replaced in tests, which have no device."""

    def pinned(self, size: int) -> Tensor:
        """uint8 [size], in memory that the device can read directly."""
        ...

    def send(self, host: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        """Start a copy; returns the device's tensor, and a function that returns whether `host` has
        been read."""
        ...


@dataclass(frozen=True)
class _InFlight:
    buffer: Tensor
    is_read: Callable[[], bool]


class PinnedStaging:
    """Copies to one device, in the order of one stream; not thread-safe.

    A buffer is reused only after the device has read it; until then another is allocated. There are
    thus as many buffers as copies in flight, however far the host runs ahead.
    """

    def __init__(self, device: torch.device | str, transport: Transport | None = None) -> None:
        self._device = torch.device(device)
        if transport is None and self._device.type == "cuda":
            transport = _Cuda(self._device)
        self._transport = transport
        self._in_flight: deque[_InFlight] = deque()

    def to_device(self, values: Values) -> Tensor:
        """A copy on the device, of the same shape and type; a list becomes int64.

        The caller may change `values` immediately afterwards. Pinned memory is used for CUDA
        devices only.
        """
        array = np.asarray(values, dtype=np.int64) if isinstance(values, list) else values
        if self._transport is None:
            return torch.from_numpy(np.array(array)).to(self._device)
        buffer = self._free_buffer(array.nbytes)
        staged = buffer.numpy()[: array.nbytes].view(array.dtype).reshape(array.shape)
        staged[...] = array
        sent, is_read = self._transport.send(_as_tensor(buffer, array))
        self._in_flight.append(_InFlight(buffer, is_read))
        return sent

    def to_device_together(self, *arrays: NDArray[np.generic]) -> list[Tensor]:
        """Copies of several arrays in one transfer; each is aligned so that kernels can load 16
        bytes at once."""
        if self._transport is None:
            # Without a transfer to save, packing them would cost 20 of a step's microseconds.
            return [self.to_device(array) for array in arrays]
        starts, size = [], 0
        for array in arrays:
            starts.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        together = np.zeros(size, dtype=np.uint8)
        for start, array in zip(starts, arrays, strict=True):
            together[start : start + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
        sent = self.to_device(together)
        pairs = zip(starts, arrays, strict=True)
        return [_as_tensor(sent[start:], array) for start, array in pairs]

    def _free_buffer(self, size: int) -> Tensor:
        """The buffer sent first, if it has been read and is large enough, else a new one."""
        if self._in_flight and self._in_flight[0].is_read():
            buffer = self._in_flight.popleft().buffer
            if len(buffer) >= size:
                return buffer
        return self._new_buffer(max(2 * size, SMALLEST))

    def _new_buffer(self, size: int) -> Tensor:
        assert self._transport is not None
        # A tensor created in inference mode could not be viewed and sent outside of it.
        with torch.inference_mode(mode=False):
            return self._transport.pinned(size)


def _as_tensor(buffer: Tensor, array: NDArray[np.generic]) -> Tensor:
    """The buffer's first bytes, as a tensor of the array's type and shape."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return buffer[: array.nbytes].view(dtype).view(array.shape)


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, host: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        sent = host.to(self._device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return sent, event.query
