"""Reusable scratch buffers, so that a step allocates nothing."""

import torch
from torch import Tensor


class Buffer:
    """Scratch memory for a matrix of one dtype; it grows on demand and never shrinks."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._scratch = torch.empty(0, device=device, dtype=dtype)

    def take(self, rows: int, columns: int) -> Tensor:
        """[rows, columns], contiguous, uninitialised; the next `take` returns the same memory."""
        size = rows * columns
        if size > len(self._scratch):
            # A tensor created in inference mode could not be written to outside of it.
            with torch.inference_mode(mode=False):
                self._scratch = torch.empty(
                    size + size // 2, device=self._scratch.device, dtype=self._scratch.dtype
                )
        return self._scratch[:size].view(rows, columns)
