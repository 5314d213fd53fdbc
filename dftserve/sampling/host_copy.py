"""Asynchronous copies of device tensors to the host."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostCopy:
    """A copy of a tensor in host memory; for a GPU tensor the transfer may not be complete yet."""

    array: Array
    """Must not be read before the transfer is complete."""
    copied: "torch.cuda.Event | None" = None
    """Recorded after an asynchronous transfer; None if the copy is already complete."""

    @classmethod
    def of(cls, tensor: Tensor) -> "HostCopy":
        if tensor.device.type != "cuda":
            return cls(tensor.cpu().numpy().copy())
        on_host = tensor.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(tensor.device))
        return cls(on_host.numpy(), copied)

    def is_there(self) -> bool:
        return self.copied is None or self.copied.query()

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
