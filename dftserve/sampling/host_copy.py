"""What a device holds, copied to the host without a wait."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class HostCopy:
    """A tensor as it was, in memory of the host; on a GPU the copy may still be under way."""

    array: Array
    """Not to be read before the copy is there."""
    copied: "torch.cuda.Event | None" = None
    """Recorded after a copy that is only enqueued."""

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
