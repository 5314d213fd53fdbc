"""The one entry point: every adapter calls this (transformers, vLLM's V1 and V2 runners); none
repeats the maths. `kernels.py` chooses how it is computed on a device."""

import torch
from torch import Tensor

from dftserve.sampling.kernels import Way, kernels
from dftserve.sampling.laws import Controls
from dftserve.sampling.slots import Slots
from dftserve.sampling.transform import Statistics


def fastest(device: torch.device) -> Way:
    """The fastest way on a device. It owns its buffers: one for each engine and thread."""
    return kernels(torch.device(device)).way()


def fastest_slots(count: int, rows_per_request: int, device: torch.device) -> Slots:
    """`Slots` of the fastest kind on a device."""
    return kernels(torch.device(device)).slots(count, rows_per_request, device)


def transform(
    logits_XV: Tensor, controls: Controls, rows_R: Tensor | None = None, way: Way | None = None
) -> Statistics:
    """Rewrite rows of logits, in place, so that sampling from them follows each row's law.

    A row comes as L/divided and leaves as y·T/divided, where softmax(y) is the distribution to
    sample from: whoever divided by T before, or does so afterwards, draws from softmax(y). The
    former argmax still attains the maximum, -inf stays -inf, other rows keep their bits.

    Args:
        logits_XV: float32, each row contiguous, changed in place. An engine that pads its
            vocabulary gives a part of wider rows.
        controls: one row of controls for each row to change.
        rows_R: int64, the rows to change, each once; None for all of them, in order.
        way: what `fastest` gave for the device, kept from call to call; None for one call.

    Returns:
        What was done; valid until the next call of the same `way`. Every check precedes the first
        write: if this raises, nothing was changed.

    Raises:
        ValueError: the logits are not a float32 matrix of contiguous rows, the rows not a list of
            int64, or not as many as rows of controls.
    """
    if logits_XV.dtype != torch.float32 or logits_XV.dim() != 2 or logits_XV.stride(1) != 1:
        raise ValueError(
            f"logits: got {logits_XV.dtype}, shape {tuple(logits_XV.shape)}, strides "
            f"{logits_XV.stride()}; accepted: a float32 matrix whose rows are contiguous."
        )
    if rows_R is not None and (rows_R.dtype != torch.int64 or rows_R.dim() != 1):
        raise ValueError(
            f"rows: got {rows_R.dtype}, shape {tuple(rows_R.shape)}; accepted: a list of int64."
        )
    rows, asked = len(logits_XV if rows_R is None else rows_R), len(controls.stop_ids_RE)
    if rows != asked:
        raise ValueError(f"rows: got {rows} and {asked} rows of controls; accepted: one for each.")
    return (way or fastest(logits_XV.device))(logits_XV, controls, rows_R)
